"""Fixtures: tiny models and tokenizers made from configs, with no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import gc
import json

import pytest
import torch

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Turn the message into JSON. Answer with one JSON object only.",
    '{"name": "Anna", "city": "Bremen", "amount": 12.5, "date": "2026-03-14"}',
    "The quick brown fox jumps over the lazy dog while seven wizards box.",
    "user assistant system hello there, how are you today? I am fine, thanks!",
]


def pytest_collection_finish():
    """What the imports made lives to the end: no collection of garbage needs to look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """The same sums in the same order, whatever ran before."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_tokenizer():
    """A small byte-level BPE tokenizer with a chat template; pad is eos, as in many chat models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(template: str | None = CHATML, special=("<|im_end|>", "<|im_start|>"), eos="<|im_end|>", bos=None):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, bos_token=bos)
        fast.add_special_tokens({"additional_special_tokens": [s for s in special if s not in (eos, bos)]})
        fast.chat_template = template
        return fast

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


GPU_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""`tiny_llama` in sizes that a GPU's kernels take."""


def tiny_llama(seed: int = 0, **options):
    """A Llama of two blocks with odd sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {
        "vocab_size": 420,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**values | options)).eval().requires_grad_(False)


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer):
    """A tiny chat model on disk."""
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def chat_file(tmp_path):
    """Twelve short conversations of two kinds."""
    path = tmp_path / "chat.jsonl"
    rows = [
        {
            "messages": [
                {"role": "system", "content": f"Turn the message into JSON, kind {i % 2}."},
                {"role": "user", "content": f"My name is number {i} and I live in city {i * 7}."},
                {"role": "assistant", "content": json.dumps({"name": i, "city": i * 7})},
            ]
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    """Each test has its own cache, but for those that use the real default model."""
    if "model" not in request.keywords:
        monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_model_cards(monkeypatch):
    """PEFT writes no README.md beside an adapter, which takes most of the time of saving a small one."""
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda model, folder: None)

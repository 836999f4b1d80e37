"""Tiny models of every architecture in the conformance table, made from configs with odd sizes, and a batch for each.

`ARCHITECTURES` lists them. A model is deterministic (its own seed), in float32, in eval mode and without dropout; its
batch holds labels, so that `outputs.loss` exists, or `loss_of` makes one of the hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

VOCAB, LENGTH, ROWS = 67, 11, 3
INVOCATION = [5, 3]
"""The token sequence that wakes an activated LoRA; every row of a text batch holds it once."""


@dataclass(frozen=True)
class Architecture:
    """One row of the table. `task` is PEFT's task type; `embedding`, `keep` and `experts` name modules or parameters."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    task: str | None
    embedding: str | None = None
    keep: str | None = None
    experts: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None
    """Default targets where PEFT has none for the architecture."""
    heads: tuple[str, ...] = ()
    """A new head that PEFT's users name in modules_to_save themselves."""
    lookups: str | None = None
    """The embeddings that look up, where `embedding` only lends its weight."""

    def model(self) -> nn.Module:
        """A fresh copy of the model."""
        return copy.deepcopy(_built(self))


@cache
def _built(architecture: Architecture) -> nn.Module:
    torch.manual_seed(sum(map(ord, architecture.name)))
    model = architecture.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide errors
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def loss_of(outputs) -> Tensor:
    """The model's own loss, or a fixed random projection of its hidden states."""
    loss = getattr(outputs, "loss", None)
    if loss is not None:
        return loss
    hidden = outputs.last_hidden_state
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7))).mean()


def scores_of(outputs) -> Tensor:
    """What the model answers: logits, or the hidden states of a model without a head."""
    logits = getattr(outputs, "logits", None)
    return outputs.last_hidden_state if logits is None else logits


def _text() -> dict[str, Tensor]:
    """Token ids with the last row padded on the right, and the invocation at another place in each row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, VOCAB, (ROWS, LENGTH), generator=generator)
    for row, place in enumerate((2, 5, 6)):
        ids[row, place : place + len(INVOCATION)] = torch.tensor(INVOCATION)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    ids[-1, -2:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def causal_batch() -> dict[str, Tensor]:
    batch = _text()
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def feature_batch() -> dict[str, Tensor]:
    return _text()


def sequence_batch() -> dict[str, Tensor]:
    return _text() | {"labels": torch.tensor([2, 0, 1])}


def token_batch() -> dict[str, Tensor]:
    batch = _text()
    return batch | {"labels": (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)}


def seq2seq_batch() -> dict[str, Tensor]:
    return _text() | {"labels": torch.randint(8, VOCAB, (ROWS, 7), generator=torch.Generator().manual_seed(4))}


def image_batch() -> dict[str, Tensor]:
    pixels = torch.randn(ROWS, 3, 18, 18, generator=torch.Generator().manual_seed(5))
    return {"pixel_values": pixels, "labels": torch.tensor([2, 0, 1])}


def speech_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    sound = torch.randn(ROWS, 10, 26, generator=generator)
    return {"input_features": sound, "labels": torch.randint(8, VOCAB, (ROWS, 7), generator=generator)}


def _decoder(name: str, **options) -> Callable[[], nn.Module]:
    """A decoder with Llama's names for its sizes: grouped heads, untied unless `options` say otherwise."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
    }
    head = options.pop("head", "ForCausalLM")
    config = options.pop("config", f"{name}Config")
    return lambda: _make(name + head, config, sizes | options)


def _other(name: str, head: str, **options) -> Callable[[], nn.Module]:
    return lambda: _make(
        name + head, f"{name}Config", {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0} | options
    )


def _make(model: str, config: str, values: dict) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**values))


def _causal(name: str, make: Callable[[], nn.Module], embedding: str = "embed_tokens", **more) -> Architecture:
    return Architecture(name, make, causal_batch, "CAUSAL_LM", embedding, **{"keep": "lm_head"} | more)


ATTENTION = ("q_proj", "v_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
GEMMA = {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 6}
BERT_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
BART_SIZES = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 36,
    "decoder_ffn_dim": 36,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
}
T5_SIZES = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 36,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 1,
    "feed_forward_proj": "gated-gelu",
}

ARCHITECTURES = [
    _causal("Llama", _decoder("Llama")),
    Architecture(
        "Llama, sequence classification",
        _decoder("Llama", head="ForSequenceClassification", num_labels=3),
        sequence_batch,
        "SEQ_CLS",
        "embed_tokens",
        "score",
    ),
    _causal("Mistral", _decoder("Mistral", sliding_window=8)),
    _causal("Qwen2", _decoder("Qwen2")),
    _causal("Qwen3", _decoder("Qwen3")),
    _causal(
        "Qwen3-MoE",
        _decoder("Qwen3Moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True),
        experts=EXPERTS,
        targets=ATTENTION,
    ),
    _causal(
        "Mixtral",
        _decoder("Mixtral", num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
        experts=EXPERTS,
        targets=ATTENTION,
    ),
    _causal("Gemma 2", _decoder("Gemma2", **GEMMA)),
    _causal("Gemma 3", _decoder("Gemma3", config="Gemma3TextConfig", **GEMMA)),
    _causal("Phi-3", _decoder("Phi3"), targets=("qkv_proj", "gate_up_proj")),
    _causal(
        "GPT-2",
        _other(
            "GPT2",
            "LMHeadModel",
            vocab_size=VOCAB,
            n_embd=24,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        "wte",
    ),
    _causal(
        "GPT-NeoX",
        _other(
            "GPTNeoX",
            "ForCausalLM",
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        ),
        "embed_in",
    ),
    _causal(
        "Falcon",
        _other(
            "Falcon",
            "ForCausalLM",
            vocab_size=VOCAB,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bias=True,
            bos_token_id=2,
        ),
        "word_embeddings",
    ),
    _causal(
        "OPT",
        _other(
            "OPT",
            "ForCausalLM",
            vocab_size=VOCAB,
            hidden_size=24,
            ffn_dim=36,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=24,
            dropout=0.0,
            attention_dropout=0.0,
        ),
    ),
    _causal(
        "BLOOM",
        _other(
            "Bloom",
            "ForCausalLM",
            vocab_size=VOCAB,
            hidden_size=24,
            n_layer=2,
            n_head=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        "word_embeddings",
    ),
    Architecture(
        "T5",
        _other("T5", "ForConditionalGeneration", **T5_SIZES),
        seq2seq_batch,
        "SEQ_2_SEQ_LM",
        "shared",
        "lm_head",
        lookups="embed_tokens",
    ),
    Architecture(
        "BART",
        _other("Bart", "ForConditionalGeneration", **BART_SIZES),
        seq2seq_batch,
        "SEQ_2_SEQ_LM",
        "shared",
        "lm_head",
        lookups="embed_tokens",
    ),
    Architecture(
        "BERT, sequence classification",
        _other("Bert", "ForSequenceClassification", **BERT_SIZES),
        sequence_batch,
        "SEQ_CLS",
        "word_embeddings",
        "classifier",
    ),
    Architecture(
        "BERT, feature extraction",
        _other("Bert", "Model", **BERT_SIZES),
        feature_batch,
        "FEATURE_EXTRACTION",
        "word_embeddings",
        "pooler",
    ),
    Architecture(
        "RoBERTa, token classification",
        _other("Roberta", "ForTokenClassification", **BERT_SIZES),
        token_batch,
        "TOKEN_CLS",
        "word_embeddings",
        "classifier",
    ),
    Architecture(
        "ViT, image classification",
        _other("ViT", "ForImageClassification", image_size=18, patch_size=6, **BERT_SIZES),
        image_batch,
        None,
        None,
        "classifier",
        targets=ATTENTION,
        heads=("classifier",),
    ),
    Architecture(
        "Whisper",
        _other(
            "Whisper",
            "ForConditionalGeneration",
            **BART_SIZES | {"num_mel_bins": 10, "max_source_positions": 13, "max_target_positions": 16},
        ),
        speech_batch,
        None,
        "embed_tokens",
        "proj_out",
        targets=ATTENTION,
    ),
]

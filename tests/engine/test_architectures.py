"""Each model type that GGUF export knows, on a small random model: llama.cpp's logits are those of Veneer.

Needs llama.cpp's sources for their converter: LLAMA_CPP_SOURCE=DIRECTORY.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import veneer
from veneer.formats.gguf import ARCHITECTURES

llama_cpp = pytest.importorskip("llama_cpp")
SOURCE = os.environ.get("LLAMA_CPP_SOURCE")
pytestmark = [pytest.mark.llama_cpp, pytest.mark.skipif(not SOURCE, reason="LLAMA_CPP_SOURCE is not set")]

IDS = [5, 17, 300, 44, 9, 211, 8, 3, 77, 123]
COMMON = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
TIED = {"head_dim": 16, "tie_word_embeddings": True}
OWN = {
    "mistral": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 1]},
    "qwen3": {"head_dim": 32},
    "gemma": TIED,
    "gemma2": TIED | {"query_pre_attn_scalar": 16},
    "gemma3_text": TIED | {"query_pre_attn_scalar": 16},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, "rotary_pct": 1.0},
}
TABULATED_GELU = {"gemma", "gemma2", "gemma3_text", "starcoder2"}
WITHOUT_TOKENIZER = """
import importlib, pkgutil, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion
from conversion.base import TextModel
for module in pkgutil.iter_modules(conversion.__path__):
    importlib.import_module("conversion." + module.name)
def none(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
def patch(kind):
    kind.set_vocab = kind._set_vocab_gpt2 = kind._set_vocab_sentencepiece = none
    for child in kind.__subclasses__():
        patch(child)
patch(TextModel)
sys.argv = ["convert", sys.argv[2], "--outfile", sys.argv[3], "--outtype", "f32"]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def engine_logits(model, adapter):
    llm = llama_cpp.Llama(
        str(model), lora_path=adapter, n_ctx=64, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False
    )
    llm.eval(IDS)
    found = torch.tensor(np.array(llm.scores[: len(IDS)]))
    llm.close()
    return found


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_base_and_adapter_in_llama_cpp(kind, tmp_path):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **COMMON | OWN.get(kind, {}))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(std=0.15)
    model.save_pretrained(tmp_path / "base")
    words = {"model": {"vocab": {str(i): i for i in range(512)}}, "added_tokens": []}  # gemma3's converter counts them
    (tmp_path / "base/tokenizer.json").write_text(json.dumps(words))
    command = [sys.executable, "-c", WITHOUT_TOKENIZER, SOURCE, str(tmp_path / "base"), str(tmp_path / "base.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    patterns = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 11}} if kind != "starcoder2" else {}
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, alpha=6, target_modules="all-linear", **patterns))
    for p in bank.parameters("default").values():
        p.data.normal_(std=0.2)
    veneer.save_adapter(model, tmp_path / "adapter")
    veneer.export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", tmp_path / "base", verify=False)
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0]
        with bank.disabled():
            alone = model(torch.tensor([IDS])).logits[0]
    bound = 1e-3 if kind in TABULATED_GELU else 1e-5
    for file, logits in ((None, alone), (str(tmp_path / "a.gguf"), wanted)):
        found = engine_logits(tmp_path / "base.gguf", file)
        torch.testing.assert_close(found, logits, rtol=0, atol=bound * float(logits.abs().max()))
    assert float((wanted - alone).abs().max()) > 0.3 * float(wanted.abs().max())

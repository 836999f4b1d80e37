"""Adapters with torchtune's own names (layers.N.attn.q_proj.lora_a.weight, …), read as PEFT's.

torchtune's Llama keeps q and k in the order of interleaved rotary pairs, like llama.cpp. Its checkpoints in PEFT's
format need no more than reading.
"""

from __future__ import annotations

import re
from pathlib import Path

from veneer.errors import AdapterFormatError, BaseModelError
from veneer.files import read_object
from veneer.formats.adapter_file import AdapterFile, Factors, read_adapter
from veneer.formats.gguf import halved
from veneer.formats.mlx import factor_pairs, read_safetensors
from veneer.formats.portable import lora_fields
from veneer.formats.shape import BaseShape

PERMUTES = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False}
MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
BLOCK = re.compile(r"layers\.(\d+)\.(.+)")


def read_torchtune(source: Path, base: BaseShape, alpha: float | None = None) -> AdapterFile:
    """A directory that torchtune wrote in PEFT's format, or a safetensors file with torchtune's names.

    `alpha` is the recipe's lora_alpha, where no adapter_config.json beside the file says it. Raises
    `AdapterFormatError` and `BaseModelError`.
    """
    if source.is_dir():
        return read_adapter(source)
    if source.suffix != ".safetensors":
        raise AdapterFormatError(
            f'{source}: Veneer opens no pickle; convert it once: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{source.name}', weights_only=True), '{source.stem}.safetensors')\""
        )
    kind = base.config.model_type
    if kind not in PERMUTES:
        raise BaseModelError(f"{base.name} is a {kind} model; from torchtune Veneer reads {', '.join(PERMUTES)}")
    config = source.parent / "adapter_config.json"
    if alpha is None and config.exists():
        alpha = read_object(config).get("lora_alpha")
    if alpha is None:
        raise AdapterFormatError(f"{source} does not hold lora_alpha: give the recipe's value with --alpha")
    pairs = factor_pairs(read_safetensors(source), ".lora_a.weight", ".lora_b.weight", source)
    layers = {}
    for name, (a, b) in pairs.items():
        path = _path(name, source)
        leaf = path.rpartition(".")[2]
        if PERMUTES[kind] and leaf in ("q_proj", "k_proj"):
            b = halved(b, base.heads(leaf))
        layers[path] = Factors(a, b, float(alpha) / a.shape[0])
    return AdapterFile(source, lora_fields(layers, base.name), layers=layers)


def _path(name: str, source: Path) -> str:
    block = BLOCK.fullmatch(name)
    if name == "output":
        return "lm_head"
    if not block or block[2] not in MODULES:
        raise AdapterFormatError(f"{source}: {name} is no module of a model that Veneer knows from torchtune")
    return f"model.layers.{block[1]}.{MODULES[block[2]]}"

"""The form of a PEFT adapter that vLLM serves right.

vLLM reads r, lora_alpha and use_rslora and knows no patterns: a layer whose α/r differs would be scaled wrongly without a
word. So: one rank that it allows, one scaling, nothing else.
"""

from __future__ import annotations

from dataclasses import replace

from veneer.errors import AdapterFormatError
from veneer.formats.adapter_file import AdapterFile
from veneer.formats.portable import plain_layers, uniform

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes."""
UNSET = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "target_parameters")


def for_vllm(adapter: AdapterFile) -> AdapterFile:
    """An adapter with the same ΔW in vLLM's form. Raises `AdapterFormatError` for what vLLM does not serve."""
    layers = plain_layers(adapter, "vLLM")
    largest = max(f.rank for f in layers.values())
    rank = next((r for r in RANKS if r >= largest), None)
    if rank is None:
        raise AdapterFormatError(
            f"{adapter.path}: rank {largest} is over vLLM's largest, {RANKS[-1]}: make it smaller (veneer resize) or merge"
        )
    layers = uniform(layers, rank)
    fields = adapter.fields | dict.fromkeys(UNSET)
    fields |= {"r": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False}
    fields |= {"lora_alpha": next(iter(layers.values())).scaling * rank, "bias": "none", "lora_bias": False}
    narrowed = any(adapter.fields.get(key) for key in ("layers_to_transform", "exclude_modules"))
    if narrowed or not isinstance(adapter.fields.get("target_modules"), list):
        fields["target_modules"] = sorted(layers)
    if isinstance(fields["lora_alpha"], float) and fields["lora_alpha"].is_integer():
        fields["lora_alpha"] = int(fields["lora_alpha"])
    return replace(adapter, fields=fields, layers=layers, rest={})

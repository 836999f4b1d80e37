"""What every foreign format needs of an adapter: plain pairs of factors, one scaling, one rank. Exact: scalings are folded
into lora_B and ranks padded with zeros."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from veneer.errors import AdapterFormatError
from veneer.formats.adapter_file import AdapterFile, Factors
from veneer.formats.peft_tensors import PREFIX

REST = {
    "lora_magnitude_vector": "DoRA magnitudes (use_dora)",
    "lora_B.bias": "biases of the update (lora_bias)",
    "trainable_tokens_delta": "trained token rows (trainable_token_indices, new tokens)",
    "bias": "trained biases (bias)",
}


def plain_layers(adapter: AdapterFile, format: str, holds: Iterable[str] = ()) -> dict[str, Factors]:
    """The factors of an adapter that has nothing else than linear layers' and embeddings' factors.

    PEFT's copies of the base's own embedding and head are left out; verifying tells if they were no copies. `holds`
    names what the format can hold besides: "aLoRA". Raises `AdapterFormatError` that names what it cannot.
    """
    source = adapter.path or "the adapter"
    name = {"alora_invocation_tokens": "aLoRA"}

    def refuse(what: str, where: str) -> None:
        way = "merge it into the base instead (veneer merge)" if "aLoRA" not in what else "serve it with Veneer or PEFT"
        raise AdapterFormatError(f"{source}: {where} {what}, which {format} does not hold: {way}")

    for field, what in name.items():
        if adapter.fields.get(field) and what not in holds:
            refuse(f"{what} ({field})", "uses")
    for key in adapter.rest:
        path = key.removeprefix(PREFIX)
        if path.endswith(".base_layer.weight") and path.removesuffix(".base_layer.weight") in adapter.layers:
            continue
        what = next((w for leaf, w in REST.items() if path.endswith(f".{leaf}") or leaf in path.split(".")), None)
        refuse(what or "a whole module (modules_to_save)", f"{path} is of")
    for path, f in adapter.layers.items():
        if f.experts > 1 or adapter.fields.get("target_parameters"):
            refuse("factors of fused expert parameters (target_parameters)", f"{path} has")
        if f.lora_A.ndim != 2:
            refuse("factors of a convolution", f"{path} has")
        if ".base_layer" in path:
            refuse("factors inside an attention module", f"{path} has")
    if not adapter.layers:
        raise AdapterFormatError(f"{source} has no factors")
    return adapter.layers


def rescaled(f: Factors, scaling: float) -> Factors:
    """The same ΔW at another scaling: lora_B times the quotient, in float32 where its own dtype would round it."""
    factor = f.scaling / scaling
    if math.isclose(factor, 1.0, rel_tol=1e-12):
        return replace(f, scaling=scaling)
    exact = f.lora_B.double() * factor
    rounded = exact.to(f.lora_B.dtype)
    return replace(f, lora_B=rounded if torch.equal(rounded.double(), exact) else exact.float(), scaling=scaling)


def padded(f: Factors, rank: int) -> Factors:
    """The same ΔW at a higher rank: rows of zeros below lora_A (rank, d_in), columns of zeros beside lora_B."""
    more = rank - f.rank
    lora_A = torch.cat([f.lora_A, f.lora_A.new_zeros(more, f.lora_A.shape[1])])
    lora_B = torch.cat([f.lora_B, f.lora_B.new_zeros(f.lora_B.shape[0], more)], 1)
    return replace(f, lora_A=lora_A, lora_B=lora_B)


def most_common(values: Iterable[float]) -> float:
    """The positive value that occurs most often; 1 where there is none."""
    counts = Counter(value for value in values if value > 0)
    return counts.most_common(1)[0][0] if counts else 1.0


def uniform(layers: Mapping[str, Factors], rank: int | None = None) -> dict[str, Factors]:
    """All layers at one rank (default: the largest) and the most common scaling."""
    rank = rank or max(f.rank for f in layers.values())
    scaling = most_common(f.scaling for f in layers.values())
    return {path: padded(rescaled(f, scaling), rank) for path, f in layers.items()}


def lora_fields(layers: Mapping[str, Factors], base: str | None) -> dict:
    """adapter_config.json for plain layers, every module by its full name; r and lora_alpha are `write_adapter`'s."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": next(iter(layers.values())).rank,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "target_modules": sorted(layers),
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }


def transposed(value: Tensor) -> Tensor:
    return value.T.contiguous()

"""PEFT's tensor keys, both ways: where each tensor of adapter_model.safetensors stands in a bank.

| what | key after the prefix |
|---|---|
| linear, convolution, attention | <path>.lora_A.weight, <path>.lora_B.weight |
| embedding | <path>.lora_embedding_A, <path>.lora_embedding_B |
| DoRA, lora_bias | <path>.lora_magnitude_vector, <path>.lora_B.bias |
| output projection of an attention | <path>.base_layer.out_proj.… |
| the n-th last adapted parameter of a module | <module>, then n times .base_layer, then .lora_A.weight … |
| trained tokens | <embedding>.token_adapter.trainable_tokens_delta |
| biases, modules_to_save (with buffers) | their own names (an adapted module's bias: <path>.base_layer.bias) |
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from veneer.adapter.bank import Bank
from veneer.adapter.layers import AdaptedAttention, AdaptedEmbedding, ParameterFactors

PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)")
LEAVES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_bias": "lora_B.bias",
}
TOKENS = "token_adapter.trainable_tokens_delta"


def factor_key(bank: Bank, targets: Iterable[str], path: str, leaf: str) -> str:
    """The key of one of a layer's tensors, without the prefix."""
    layer = bank.layers[path]
    if isinstance(layer, AdaptedEmbedding) and leaf in ("lora_A", "lora_B"):
        return f"{path}.lora_embedding_{leaf[-1]}"
    owner = path.rpartition(".")[0]
    if isinstance(layer, ParameterFactors):
        order = [name for name, _ in layer.owner.named_parameters(recurse=False)]
        later = [n for n in order[order.index(layer.parameter) + 1 :] if f"{owner}.{n}" in set(targets)]
        path = owner + ".base_layer" * len(later)
    elif attention_output(bank, path):
        path = f"{owner}.base_layer.out_proj"
    return f"{path}.{LEAVES[leaf]}"


def slots(bank: Bank, name: str) -> dict[str, tuple[Tensor, ...]]:
    """An adapter's tensors by PEFT's keys: (trained,), or (trained, frozen start) where an initialisation counts twice."""
    entry, found = bank.entries[name], {}
    for path in entry.targets:
        layer = bank.layers[path]
        for leaf, value in layer.trained(name).items():
            start = getattr(layer, f"{leaf}_start", {})
            pair = (value, start[name]) if name in start else (value,)
            found[factor_key(bank, entry.targets, path, leaf)] = pair
    for path in entry.tokens:
        found[f"{path}.{TOKENS}"] = (bank.tokens[path].lora_rows[name],)
    for path, module in entry.modules.items():
        found |= {f"{path}.{key}": (value,) for key, value in module.named_parameters()}
    found |= {key: (value,) for key, value in bank.buffers(name).items()}
    for key, value in entry.biases.items():
        owner, _, leaf = key.rpartition(".")
        if owner in entry.targets:
            key = factor_key(bank, entry.targets, owner, "lora_A").rpartition(".lora_")[0] + f".base_layer.{leaf}"
        found[key] = (value,)
    return found


def attention_output(bank: Bank, path: str) -> AdaptedAttention | None:
    """The attention whose output projection a target is; None if it is none."""
    owner, _, last = path.rpartition(".")
    layer = bank.layers.get(owner) if last == "out_proj" else None
    return layer if isinstance(layer, AdaptedAttention) else None


def stored_factor(bank: Bank, name: str, path: str) -> float:
    """What lora_B is multiplied with in the file.

    PEFT (0.14 to 0.21 at least) adds the update of an attention's output projection twice and gives it the scaling of
    the input projection: a file means 2·s·B·A there.
    """
    attention = attention_output(bank, path)
    return bank.layers[path].scaling[name] / (2 * attention.scaling[name]) if attention else 1.0


def adapter_tensors(bank: Bank, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys, on the CPU: [A; A₀] and [B, −B₀] where an initialisation counts twice."""
    found = {}
    for key, (value, *start) in slots(bank, name).items():
        if start:
            value = torch.cat([value, -start[0]], dim=1) if ".lora_B." in key else torch.cat([value, start[0]])
        found[PREFIX + key] = value.detach().to("meta" if value.is_meta else "cpu", copy=True).contiguous()
    for path in bank.entries[name].targets:
        if (factor := stored_factor(bank, name, path)) != 1.0:
            found[PREFIX + factor_key(bank, bank.entries[name].targets, path, "lora_B")] *= factor
    return found


def assign(bank: Bank, name: str, tensors: dict[str, Tensor]) -> None:
    """Copy tensors under PEFT's keys (without the prefix) into an adapter: the inverse of `adapter_tensors`."""
    with torch.no_grad():
        for key, (value, *start) in slots(bank, name).items():
            given = tensors[key]
            if not start:
                value.copy_(given.reshape(value.shape))
            elif ".lora_B." in key:
                value.copy_(given[:, : value.shape[1]]), start[0].copy_(-given[:, value.shape[1] :])
            else:
                value.copy_(given[: value.shape[0]]), start[0].copy_(given[value.shape[0] :])
        for path in bank.entries[name].targets:
            bank.layers[path].lora_B[name].div_(stored_factor(bank, name, path))


def split(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Tensors without the prefix → ({path as in the file: {leaf: tensor}}, {embedding: rows}, {name: the rest})."""
    factors: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    leaf_of = {key: leaf for leaf, key in LEAVES.items()} | {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
    for key, value in tensors.items():
        key = key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key
        found = FACTOR.fullmatch(key)
        if found:
            factors.setdefault(found[1], {})[leaf_of[found[2]]] = value
        elif key.endswith(f".{TOKENS}"):
            rows[key.removesuffix(f".{TOKENS}")] = value
        elif not _is_second_copy(key, tensors):
            rest[key.replace(".base_layer.", ".")] = value
    return factors, rows, rest


def _is_second_copy(key: str, tensors: dict[str, Tensor]) -> bool:
    """With bias "all" PEFT writes a kept module's bias three times: as its own, trained again, and the base's."""
    copy = re.fullmatch(r"(.+)\.(?:modules_to_save|original_module)\.(.+)", key)
    return copy is not None and f"{copy[1]}.{copy[2]}" in tensors


def resolve_paths(factors: dict[str, dict[str, Tensor]], parameters: list[str]) -> dict[str, dict[str, Tensor]]:
    """The factors by Veneer's target names: `.base_layer` taken out, adapted parameters by their own names.

    `parameters` are the full names of the target parameters, in the model's order.
    """
    by_owner: dict[str, list[str]] = {}
    for parameter in parameters:
        by_owner.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    found = {}
    for path, parts in factors.items():
        plain = path.replace(".base_layer", "")
        if plain in by_owner:
            depth = path.count(".base_layer")
            own = by_owner[plain]
            plain = own[-1 - depth] if depth < len(own) else plain
        found[plain] = parts
    return found


__all__ = ["PREFIX", "adapter_tensors", "assign", "resolve_paths", "slots", "split"]

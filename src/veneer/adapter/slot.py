"""A slot: an adapter on a model whose factors can be exchanged in place, for ones of another rank.

All factors of a slot lie in one buffer on the device, with room for a rank that is fixed when it is made; a smaller rank
fills up with zero rows, which add nothing, and each scaling is in B. So a swap is one copy into the same addresses: no
compiled code is made anew, and a captured CUDA graph goes on with the new factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.adapter.bank import Bank
from veneer.adapter.layers import AdaptedAttention, AdaptedModule, ParameterFactors
from veneer.errors import AdapterStateError

Source = Mapping[str, tuple[Tensor, Tensor, float]]
"""Target name → (lora_A, lora_B, scaling) in PEFT's shapes, of any rank up to the slot's."""


@dataclass(frozen=True)
class Slot:
    """`buffer` holds, layer after layer, lora_A and then lora_B, each as its own contiguous piece."""

    rank: int
    buffer: Tensor
    pieces: dict[str, tuple[slice, slice]]

    @property
    def bytes(self) -> int:
        """What one swap copies."""
        return self.buffer.numel() * self.buffer.element_size()


def reserve(bank: Bank, name: str, rank: int) -> Slot:
    """Make an adapter a slot with room for `rank`; it goes on acting as it did.

    Raises `AdapterStateError` for an adapter that is more than factors (DoRA, lora_bias, whole modules, biases, trained
    tokens, aLoRA, an initialisation that changes the base), is being trained through its start, or has a larger rank.
    """
    entry = bank.check(name)
    layers = [(path, bank.layers[path]) for path in entry.targets]
    _check_plain(bank, name, layers, rank)
    parts, pieces, at = [], {}, 0
    for path, layer in layers:
        both = _filled(layer, rank, layer.lora_A[name], layer.lora_B[name], layer.scaling[name])
        ends = [at + both[0].numel(), at + both[0].numel() + both[1].numel()]
        pieces[path] = slice(at, ends[0]), slice(ends[0], ends[1])
        parts += [part.reshape(-1) for part in both]
        at = ends[1]
    slot = Slot(rank, torch.cat(parts).detach(), pieces)
    for path, layer in layers:
        for table, piece, shape in zip((layer.lora_A, layer.lora_B), pieces[path], layer.factor_shapes(rank)):
            table[name] = torch.nn.Parameter(slot.buffer[piece].view(shape), requires_grad=False)
        layer.rank[name], layer.alpha[name], layer.scaling[name] = rank, float(rank), 1.0
        layer.options[name] = replace(layer.options[name], rslora=False)
    entry.config = entry.config.model_copy(
        update={"rank": rank, "alpha": float(rank), "rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    )
    bank.slots[name] = slot
    return slot


def prepare(bank: Bank, name: str, source: Source) -> Tensor:
    """The contents of a slot for another adapter, in host memory (pinned where there is a GPU): the slow half of a swap.

    Layers of the slot that `source` lacks hold zeros. Raises `AdapterStateError` for a target that the slot lacks, a
    rank above its own, or other shapes.
    """
    slot = _slot(bank, name)
    unknown = [path for path in source if path not in slot.pieces]
    if unknown:
        raise AdapterStateError(f"slot {name!r} has no {unknown[0]}: reserve an adapter with all the targets to swap")
    filled = torch.zeros(slot.buffer.shape, dtype=slot.buffer.dtype, pin_memory=slot.buffer.is_cuda)
    for path, (lora_A, lora_B, scaling) in source.items():
        layer = bank.layers[path]
        rank = layer._rank_of(lora_A)
        if rank > slot.rank:
            raise AdapterStateError(f"{path} has rank {rank}, above the {slot.rank} of slot {name!r}")
        if (tuple(lora_A.shape), tuple(lora_B.shape)) != layer.factor_shapes(rank):
            raise AdapterStateError(f"{path}: factors {tuple(lora_A.shape)} and {tuple(lora_B.shape)} do not fit")
        for piece, part in zip(slot.pieces[path], _filled(layer, slot.rank, lora_A, lora_B, scaling)):
            filled[piece] = part.reshape(-1).to(filled.dtype)
    return filled


def swap(bank: Bank, name: str, source: Source | Tensor) -> None:
    """Exchange a slot's factors in place: `prepare`d contents, or a source that is prepared first. One copy."""
    slot = _slot(bank, name)
    if not isinstance(source, Tensor):
        source = prepare(bank, name, source)
    if source.shape != slot.buffer.shape:
        raise AdapterStateError(f"the contents were prepared for another slot than {name!r}")
    with torch.no_grad():
        slot.buffer.copy_(source, non_blocking=True)


def _slot(bank: Bank, name: str) -> Slot:
    bank.check(name)
    if name not in bank.slots:
        raise AdapterStateError(f"adapter {name!r} is no slot: veneer.reserve(bank, {name!r}, rank) first")
    if bank.merged is not None:
        raise AdapterStateError("adapters are merged into the base: unmerge() first")
    return bank.slots[name]


def _check_plain(bank: Bank, name: str, layers: list[tuple[str, AdaptedModule]], rank: int) -> None:
    entry = bank.entries[name]
    more = {
        "whole modules": entry.modules,
        "biases": entry.biases,
        "trained tokens": entry.tokens,
        "an invocation (aLoRA)": name in bank.routing.tokens,
    }
    more |= {
        option: any(getattr(layer.options[name], option) for _, layer in layers) for option in ("dora", "lora_bias")
    }
    more["a start that counts twice"] = any(layer.options[name].changes_base for _, layer in layers)
    more["expert parameters or MultiheadAttention"] = any(
        isinstance(layer, (ParameterFactors, AdaptedAttention)) for _, layer in layers
    )
    reason = next((what for what, there in more.items() if there), None)
    if reason:
        raise AdapterStateError(f"adapter {name!r} has {reason}: a slot holds lora_A and lora_B alone")
    if bank.merged is not None:
        raise AdapterStateError("adapters are merged into the base: unmerge() first")
    largest = max(layer.rank[name] for _, layer in layers)
    if largest > rank:
        raise AdapterStateError(f"adapter {name!r} has rank {largest}, above the {rank} to reserve")


def _filled(layer: AdaptedModule, rank: int, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Factors at a larger rank, with zeros after the own rows of A and columns of B, and the scaling in B."""
    shapes = layer.factor_shapes(rank)
    wide_A, wide_B = lora_A.new_zeros(shapes[0]), lora_B.new_zeros(shapes[1])
    wide_A[: lora_A.shape[0]] = lora_A.detach()
    wide_B[:, : lora_B.shape[1]] = lora_B.detach() * scaling
    return wide_A, wide_B

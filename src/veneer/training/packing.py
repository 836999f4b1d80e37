"""Linears of one input packed into one matrix, for compiled blocks: found by watching one forward pass.

See `veneer.kernels.group` for the matrix and what it is good for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import quantised
from veneer.adapter.calls import recorded
from veneer.adapter.frozen import is_quantised
from veneer.adapter.layers import AdaptedLinear
from veneer.kernels.group import factor_views, lora_member, packed_size, parts
from veneer.kernels.scaled_copies import ScaledCopies
from veneer.kernels.unpack import BLOCK, NESTED


class PackedGroup:
    """The adapted linears of one input in one matrix; `active` is the adapter that acts.

    `source` is what `veneer.kernels.group` wants; `views` are the places of A_i and s_i B_i in it, by linear. The weights
    become views of the matrix; 4-bit ones stay as they are and the matrix is made of them when it is needed.
    """

    def __init__(self, layers: Sequence[AdaptedLinear], active: str, matrix: Tensor | None = None) -> None:
        """`matrix`: one that holds the weights already, in which they are put by others."""
        self.layers, self.active = list(layers), active
        self.factors = [(layer.lora_A, layer.lora_B) for layer in layers]
        self.sizes = tuple(layer.d_out for layer in layers)
        self.ranks = tuple(layer.rank[active] for layer in layers)
        device, dtype = layers[0].place()
        self.scales: list[float] = []
        self.scaling = torch.zeros(sum(self.ranks), device=device)
        self.four_bits = is_quantised(layers[0].base_layer)
        rows, columns = packed_size(self.sizes, self.ranks, layers[0].d_in)
        if self.four_bits:
            total, ranks = sum(self.sizes), sum(self.ranks)
            side = torch.zeros(total, ranks, device=device, dtype=dtype)
            bottom = torch.zeros(ranks, columns - ranks, device=device, dtype=dtype)
            self.source = (side, bottom, *_four_bit_parts([layer.base_layer for layer in layers]))
            self.views = factor_views(side, bottom, self.sizes, self.ranks)
        else:
            self.own = matrix is None
            matrix = torch.zeros(rows, columns, device=device, dtype=dtype) if self.own else matrix
            self.source = (matrix,)
            # `.data`: autograd does not see when factors are written between a forward and a backward pass
            places = parts(matrix.data, self.sizes, self.ranks)
            self.views = [(a, b) for _, a, b in places]
            for layer, (place, _, _) in zip(layers, places if self.own else ()):
                place.copy_(layer.base_layer.weight.detach())
                layer.base_layer.weight.data = place
        for index, layer in enumerate(layers):
            layer.packed = Member(self, index, dtype)

    def unpack(self) -> None:
        """Give each linear a weight of its own again."""
        for layer in self.layers:
            if not self.four_bits and self.own:
                layer.base_layer.weight.data = layer.base_layer.weight.detach().contiguous()
            layer.packed = None


class Member:
    """One linear's place in its group; called with (x, bias, lora_A, lora_B) for the adapter and weight in `active`."""

    def __init__(self, group: PackedGroup, index: int, dtype: torch.dtype) -> None:
        self.source, self.scaling, self.index, self.dtype = group.source, group.scaling, index, dtype
        self.sizes, self.ranks, self.active = group.sizes, group.ranks, (group.active, 1.0)

    def __call__(self, x: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        return lora_member(x, self.source, self.scaling, self.sizes, self.ranks, self.index, bias, lora_A, lora_B)


def _four_bit_parts(linears: Sequence[nn.Module]) -> list[Tensor]:
    """The quantised part of a source (`veneer.kernels.unpack`) for bitsandbytes' 4-bit linears."""
    states = [linear.weight.quant_state for linear in linears]
    empty = states[0].code.new_empty(0)
    packed = [linear.weight.data.view(-1).view(torch.uint8) for linear in linears]
    outer = [state.state2 if state.nested else None for state in states]
    nested = [empty if two is None else two.absmax for two in outer]
    offset = [empty if two is None else state.offset.reshape(1).float() for two, state in zip(outer, states)]
    code2 = empty if outer[0] is None else outer[0].code
    return [states[0].code, code2, *packed, *[state.absmax for state in states], *nested, *offset]


class Packing:
    """All packed groups of a model. `refresh` must follow every change of the factors."""

    def __init__(self) -> None:
        self.groups: list[PackedGroup] = []
        self.copies = ScaledCopies()

    def pack(self, blocks: Sequence[nn.Module], names: Sequence[Sequence[str]]) -> None:
        """Pack the linears of these names in each block, where a group can be."""
        for block in blocks:
            for layers in named(block, names):
                active = common_adapter(layers)
                if active is not None:
                    self.groups.append(PackedGroup(layers, active))

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the factors in the matrices up to date."""
        if not self.groups:
            return
        factors = [(a[group.active], b[group.active]) for group in self.groups for a, b in group.factors]
        for group in self.groups:
            scales = [layer.scaling[group.active] for layer in group.layers]
            if scales != group.scales:
                group.scales = scales
                group.scaling.copy_(torch.tensor(scales).repeat_interleave(torch.tensor(group.ranks)))
        views = [view for group in self.groups for view in group.views]
        scaling = [scale for group in self.groups for scale in group.scales]
        self.copies.run(
            [*[a for a, _ in factors], *[b for _, b in factors]],
            [*[a for a, _ in views], *[b for _, b in views]],
            [*[1.0] * len(views), *scaling],
        )

    def tensors(self) -> list[Tensor]:
        """All that the groups' products read."""
        return [tensor for group in self.groups for tensor in (*group.source, group.scaling)]

    def unpack(self) -> None:
        """Undo it all."""
        for group in self.groups:
            group.unpack()
        self.groups.clear()


def named(block: nn.Module, names: Sequence[Sequence[str]]) -> list[list[Any]]:
    """The modules of these names, by group, without groups that are not in this block: another may have experts there."""
    own = dict(block.named_modules())
    return [[own[name] for name in group] for group in names if all(name in own for name in group)]


def common_adapter(layers: Sequence[Any]) -> str | None:
    """The one adapter that acts in all these layers as a plain LoRA over a frozen weight that can be packed; or None."""
    names, kinds = set(), set()
    for layer in layers:
        kind, active = _kind(layer), layer.active() if type(layer) is AdaptedLinear else []
        if kind is None or len(active) != 1 or layer.packed is not None:
            return None
        name, share = active[0]
        options = layer.options[name]
        plain = not (options.dora or options.lora_bias or options.changes_base or options.dropout)
        trained = layer.lora_A[name].requires_grad and layer.lora_B[name].requires_grad
        if not plain or not trained or share != 1.0 or name in layer.routing.tokens:
            return None
        names.add(name)
        kinds.add((kind, layer.place(), layer.d_in))
    return names.pop() if len(names) == len(kinds) == 1 else None


def _kind(layer: Any) -> tuple | None:
    """How an adapted linear's weight can be packed, alike for all of a group; None if it cannot."""
    if type(layer) is not AdaptedLinear:
        return None
    base = layer.base_layer
    if type(base) is nn.Linear and not is_quantised(base):
        free = base.weight.is_contiguous() and not base.weight.requires_grad
        return ("dense",) if free and base.weight.is_floating_point() else None
    if quantised.method(base) not in ("nf4", "fp4"):
        return None
    state = base.weight.quant_state
    known = state.blocksize == BLOCK and (not state.nested or state.state2.blocksize == NESTED)
    return (state.quant_type, state.nested) if known and math.prod(state.shape) % BLOCK == 0 else None


@contextmanager
def watch(block: nn.Module) -> Iterator[list[list[str]]]:
    """Afterwards the list holds which adapted linears of a block were called with one and the same tensor, in groups.

    A group with a linear that was called twice is left out.
    """
    linears = {name: module for name, module in block.named_modules() if type(module) is AdaptedLinear}
    found: list[list[str]] = []
    with recorded(linears) as calls:
        yield found
    times, groups = Counter(name for name, _ in calls), {}
    for name, x in calls:
        groups.setdefault(x, []).append(name)
    found += [group for group in groups.values() if all(times[name] == 1 for name in group)]

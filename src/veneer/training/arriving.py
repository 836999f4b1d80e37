"""Linears of one input packed into one matrix, over a streamed base: the matrix is put together as a block arrives.

All blocks are computed from one buffer, so their matrices are at one place. Each block's float weights are moved there
from the buffer that they were copied to, and 4-bit ones are unpacked into it: once for all rows of a step. Then the next
block is copied while this one computes, so float blocks take no more memory than two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import quantised
from veneer.base.held import Block, view_of
from veneer.base.stream import Conveyor
from veneer.kernels.group import packed_size, parts
from veneer.kernels.unpack import unpack_rows
from veneer.training.packing import PackedGroup, Packing, common_adapter, named


@dataclass
class Group:
    """Adapted linears of one input that can be packed: their matrix's size and dtype, and what it is filled with.

    `leaves` are by linear the places in the block's leaves of its float weight, or of a 4-bit one's packed values, code,
    absmax and with double quantisation nested absmax, nested code and offset.
    """

    layers: list[Any]
    active: str
    shape: tuple[int, int]
    dtype: torch.dtype
    leaves: list[list[int]]

    @property
    def four_bits(self) -> bool:
        return len(self.leaves[0]) > 1


class Arriving:
    """Packs what it can of a conveyor's blocks; `close` undoes it, also after `pack` failed in its midst.

    The factors are written beside the weights whenever a block arrives, so they are never out of date in a step. 4-bit
    linears are stood in for by float ones whose weights are in the matrix.
    """

    def __init__(self, conveyor: Conveyor) -> None:
        self.conveyor = conveyor
        self.arranged = False
        self.packings: dict[int, Packing] = {}
        self.unpacking: dict[int, list[tuple[Tensor, list[int]]]] = {}
        """By block the places of 4-bit weights, (O, I), and the leaves that they are made of."""
        self.replaced: list[tuple[Any, nn.Module]] = []

    def pack(self, blocks: Sequence[nn.Module | None], names: Sequence[Sequence[str]]) -> None:
        """Pack the linears of these names, which have one input, in each block (None: leave it)."""
        conveyor = self.conveyor
        found = [_groups(held, block, names) for held, block in zip(conveyor.blocks, blocks, strict=True)]
        if not any(found):
            return
        spots, starts, sizes = zip(*[_spots(held, groups) for held, groups in zip(conveyor.blocks, found)])
        self.arranged = True
        conveyor.arrange(spots, max(sizes), self._arrived)
        for i, groups in enumerate(found):
            self.packings[i], self.unpacking[i] = Packing(), []
            places = [self._matrix(i, group, start) for group, start in zip(groups, starts[i])]
            with conveyor.use(i, range(i + 1, len(found))):
                for group, matrix in zip(groups, places):
                    self.packings[i].groups.append(PackedGroup(group.layers, group.active, matrix))

    def _matrix(self, i: int, group: Group, start: int) -> Tensor:
        """A group's matrix in the buffer; its 4-bit linears are replaced by float ones there.

        `.data`: autograd does not see when a block is written between another's forward and backward pass.
        """
        matrix = view_of(self.conveyor.cast, start, torch.empty(group.shape, device="meta"), group.dtype)
        if group.four_bits:
            ranks = [layer.rank[group.active] for layer in group.layers]
            places = parts(matrix.data, [layer.d_out for layer in group.layers], ranks)
            for layer, (weight, _, _), leaves in zip(group.layers, places, group.leaves):
                self.unpacking[i].append((weight, leaves))
                self.replaced.append((layer, layer.base_layer))
                layer.base_layer = _float_linear(layer.base_layer, weight.data)
        return matrix

    @torch.no_grad()
    def _arrived(self, i: int, raw: list[Tensor]) -> None:
        for weight, leaves in self.unpacking.get(i, ()):
            q, code, absmax, *outer = (raw[at] for at in leaves)
            nested, nested_code, offset = outer or [code.new_empty(0)] * 3
            unpack_rows(weight, q.view(-1).view(torch.uint8), code, absmax, nested, nested_code, offset.reshape(-1))
        if i in self.packings:
            for group in self.packings[i].groups:
                matrix: Tensor = group.source[0].data
                matrix[:, matrix.shape[1] - sum(group.ranks) :].zero_()  # another block's, which may lie otherwise
            self.packings[i].refresh()

    def close(self) -> None:
        """Undo it all."""
        for packing in self.packings.values():
            packing.unpack()
        for layer, base in self.replaced:
            layer.base_layer = base
        for found in (self.packings, self.unpacking, self.replaced):
            found.clear()  # before the buffers are made anew: these are views of the old ones
        if self.arranged:
            self.conveyor.arrange()


def _spots(held: Block, groups: Sequence[Group]) -> tuple:
    """As `Block.spots` for these groups' matrices; what 4-bit ones alone are made of is not moved."""
    matrices, read, made = [], set(), set()
    for group in groups:
        leaves = [] if group.four_bits else [held.leaves[at] for (at,) in group.leaves]
        matrices.append((leaves, *group.shape, group.dtype))
        for layer, own in zip(group.layers, group.leaves if group.four_bits else ()):
            read |= set(own)
            made |= {id(owner) for owner in _owners(layer.base_layer)}
    left = {id(held.leaves[at]) for at in read if all(id(p.owner) in made for p in held.leaves[at].places)}
    return held.spots(matrices, left)


def _owners(linear: nn.Module) -> list[Any]:
    """What holds the tensors of a 4-bit linear's weight."""
    state = linear.weight.quant_state
    return [linear.weight, state, *([state.state2] if state.nested else [])]


def _float_linear(linear: nn.Module, weight: Tensor) -> nn.Linear:
    """A frozen linear of this very weight (O, I), with another's bias."""
    made = nn.Linear(1, 1, bias=False, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), linear.bias
    return made


def _groups(held: Block, block: nn.Module | None, names: Sequence[Sequence[str]]) -> list[Group]:
    """The groups of linears that can be packed."""
    where = {(id(place.owner), place.name): at for at, leaf in enumerate(held.leaves) for place in leaf.places}
    found = []
    for layers in named(block, names) if block is not None else ():
        active = common_adapter(layers)
        if active is None:
            continue
        leaves = [_leaves(where, layer.base_layer) for layer in layers]
        if all(None not in own and len(held.leaves[own[0]].places) == 1 for own in leaves):
            ranks = [layer.rank[active] for layer in layers]
            shape = packed_size([layer.d_out for layer in layers], ranks, layers[0].d_in)
            four_bits = len(leaves[0]) > 1
            dtype = layers[0].place()[1] if four_bits else held.leaves[leaves[0][0]].dtype
            found.append(Group(layers, active, shape, dtype, leaves))
    return found


def _leaves(where: dict[tuple[int, str], int], linear: nn.Module) -> list[int | None]:
    """`Group.leaves` of one linear; None for what the block does not hold."""
    weight = where.get((id(linear.weight), "data"))
    if quantised.method(linear) is None:
        return [weight]
    state = linear.weight.quant_state
    parts = [(state, "code"), (state, "absmax")]
    if state.nested:
        parts += [(state.state2, "absmax"), (state.state2, "code"), (state, "offset")]
    return [weight, *[where.get((id(owner), name)) for owner, name in parts]]

"""Float linears of one input packed into one matrix, over a streamed base: the matrix is put together as a block arrives.

All blocks are computed from one buffer, so their matrices are at one place, and each block's weights are moved there from
the buffer that they were copied to: two passes over a block's bytes at the device's own speed. Then the next block is
copied while this one computes, so no more memory is taken than for two blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer.adapter.frozen import is_quantised
from veneer.base.held import Block, Leaf, view_of
from veneer.base.stream import Conveyor
from veneer.kernels.group import packed_size
from veneer.training.packing import PackedGroup, Packing, common_adapter


class Arriving:
    """Packs what it can of each block (None: leave it), whose linears of these names have one input; then `close` it.

    The factors are written beside the weights whenever a block arrives, so they are never out of date in a step.
    """

    def __init__(self, conveyor: Conveyor, blocks: Sequence[nn.Module | None], names: Sequence[Sequence[str]]) -> None:
        self.conveyor = conveyor
        self.packings: dict[int, Packing] = {}
        found = [_groups(held, block, names) for held, block in zip(conveyor.blocks, blocks, strict=True)]
        if not any(found):
            return
        spots, starts, sizes = zip(*[
            held.spots([(leaves, *shape) for _, _, leaves, shape in groups])
            for held, groups in zip(conveyor.blocks, found)
        ])  # fmt: skip
        conveyor.arrange(spots, max(sizes), self._arrived)
        for i, groups in enumerate(found):
            with conveyor.use(i, range(i + 1, len(found))):
                packing = Packing()
                for (layers, active, leaves, shape), start in zip(groups, starts[i]):
                    matrix = view_of(conveyor.cast, start, torch.empty(shape, device="meta"), leaves[0].dtype)
                    packing.groups.append(PackedGroup(layers, active, matrix))
            self.packings[i] = packing

    @torch.no_grad()
    def _arrived(self, i: int) -> None:
        if i in self.packings:
            for group in self.packings[i].groups:
                matrix: Tensor = group.source[0].data
                matrix[:, matrix.shape[1] - sum(group.ranks) :].zero_()  # another block's, which may lie otherwise
            self.packings[i].refresh()

    def close(self) -> None:
        """Undo it all."""
        for packing in self.packings.values():
            packing.unpack()
        if self.packings:
            self.conveyor.arrange()


def _groups(held: Block, block: nn.Module | None, names: Sequence[Sequence[str]]) -> list[tuple]:
    """(layers, adapter, leaves, the matrix's shape) of each group of float linears that can be packed."""
    own: dict[int, Leaf] = {id(p.owner): leaf for leaf in held.leaves for p in leaf.places if len(leaf.places) == 1}
    found = []
    for group in names if block is not None else ():
        layers = [block.get_submodule(name) for name in group]
        active = common_adapter(layers) if layers else None
        if active is None or is_quantised(layers[0].base_layer):
            continue
        leaves = [own.get(id(layer.base_layer.weight)) for layer in layers]
        if None not in leaves:
            ranks = [layer.rank[active] for layer in layers]
            shape = packed_size([layer.d_out for layer in layers], ranks, layers[0].d_in)
            found.append((layers, active, leaves, shape))
    return found

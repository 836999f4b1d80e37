"""What several adapters have in common in a pass: the blocks below the first adapted one, run once for equal rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.blocks import repeated_blocks
from veneer.adapter.layers import AdaptedModule
from veneer.data.pack import Row, join
from veneer.kernels.attention import Layout


@dataclass(frozen=True)
class Start:
    """The tokens that the lower blocks read (`row`), which of them each token of the pass comes from (`index`), and the
    blocks that get every copy."""

    row: Row
    index: Tensor
    upper: Sequence[nn.Module]

    @contextmanager
    def spreading(self, segments: list, whole: list, layout: Layout | None) -> Iterator[None]:
        """Hooks for one forward pass: from the first adapted block on, blocks get every copy.

        `segments` is the list that attention reads; it takes on the items of `whole`, the pass's own, there. `layout` is
        the pass's own too.
        """
        spread = _Spread(self, layout)

        def before(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            segments[:] = whole
            return tuple(map(spread, args)), {key: spread(value) for key, value in kwargs.items()}

        hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in self.upper]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class SharedStart:
    """Runs the blocks below the first adapted one on each different row once, and the others on every adapter's copy.

    No adapter acts below that block, so equal rows have equal hidden states there; above it they part. Nothing is shared
    where an embedding or the first block is adapted.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], first: int) -> None:
        self.model, self.blocks, self.first = model, blocks, first
        self.device = next(model.parameters()).device

    @classmethod
    def of(cls, model: nn.Module) -> SharedStart:
        """For the adapters that are on a model now."""
        blocks = repeated_blocks(model)
        adapted = [any(_holds_factors(m) for m in block.modules()) for block in blocks]
        inside = {id(m) for block in blocks for m in block.modules()}
        outside = any(_holds_factors(m) for m in model.modules() if id(m) not in inside)
        first = 0 if outside else next((i for i, yes in enumerate(adapted) if yes), 0)
        return cls(model, blocks, first)

    @contextmanager
    def sharing(self, rows: Sequence[Row]) -> Iterator[Start | None]:
        """The start of a pass over these rows; None, with nothing shared, where they all differ or nothing can be."""
        known: dict[Any, int] = {}
        which = [known.setdefault(_key(row), len(known)) for row in rows] if self.first else []
        if not self.first or len(known) == len(rows):
            yield None
            return
        unique = [rows[which.index(n)] for n in range(len(known))]
        starts = [sum(len(row.input_ids) for row in unique[:n]) for n in range(len(unique))]
        parts = [torch.arange(starts[n], starts[n] + len(unique[n].input_ids)) for n in which]
        yield Start(join(unique), torch.cat(parts).to(self.device), self.blocks[self.first :])


class _Spread:
    """What a block is given, with a copy of the tokens for every adapter that has them."""

    def __init__(self, start: Start, layout: Layout | None) -> None:
        self.short, self.index, self.layout = len(start.row.input_ids), start.index, layout
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Layout):
            return self.layout
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 1 and len(value) == self.short:
            return value[self.index]
        if value.ndim < 2 or value.shape[0] != 1 or value.shape[1] != self.short:
            return value
        if id(value) not in self.made:  # the same tensors come to every block
            self.made[id(value)] = value, value.index_select(1, self.index)
        return self.made[id(value)][1]


def _holds_factors(module: nn.Module) -> bool:
    return isinstance(module, AdaptedModule) and (len(module.lora_A) > 0 or bool(getattr(module, "names", ())))


def _key(row: Row) -> Any:
    return row.input_ids.tobytes(), row.position_ids.tobytes(), row.segments

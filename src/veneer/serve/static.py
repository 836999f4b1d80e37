"""Batches at fixed addresses, which captured graphs read: rows of one token each, and pieces of prompts.

All whole numbers of a batch lie in one tensor `numbers` and all weights in another, so that a pass is sent in two copies.
Legend: B rows, T tokens of prompts, U uses (adapters a row may stack), E prompts that may end in a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels import served, served_attention, served_prompts
from veneer.serve.cache import SlotCache
from veneer.serve.pool import Stack
from veneer.serve.routing import Uses


@dataclass
class Tiles:
    """A plan (`routing.Plan`) whose tiles (U, N, 1 + M) int64 and weights (B, U) float32 are read on the device."""

    tiles: Tensor
    weights: Tensor

    def shrink(self, x: Tensor, stack: Stack) -> Tensor:
        """(splits, U, B, n·R) float32."""
        return served.shrink(x.contiguous(), stack.A, self.tiles)

    def expand(self, hidden: Tensor, stack: Stack, ys: Sequence[Tensor]) -> None:
        """Each y += its update, in place."""
        served.expand(hidden, stack.B, self.tiles, self.weights, ys)


class Static:
    """What both kinds of batch have: tokens, positions and slots, and tables for adapters. `spare` is padding's slot."""

    body: Tiles
    head: Tiles
    keep: Tensor | int
    """Whose logits are wanted, as `Runner` hands it to the model."""
    room: int
    """Adapters that a row may have."""
    fused = False
    """Whether blocks that can (`block.ServedBlock`) take the pass: only what has at most one adapter a row."""

    def __init__(self, cache: SlotCache, rows: int, numbers: Sequence[int], weights: int, device: torch.device) -> None:
        """`numbers` are the sizes of the tables that follow the three of `rows` numbers."""
        self.cache, self.spare = cache, cache.store.shape[2] - 1
        self.numbers = torch.zeros(3 * rows + sum(numbers), dtype=torch.int64, device=device)
        self.weights = torch.zeros(weights, dtype=torch.float32, device=device)
        self.ids, self.positions, self.slots, *self.tables = self.numbers.split([rows, rows, rows, *numbers])
        self.slots.fill_(self.spare)
        self.where = torch.zeros_like(self.slots)

    @property
    def table(self) -> served.Table:
        """Every row's first use."""
        return served.Table(self.body.tiles[0], self.body.weights)

    def locate(self) -> None:
        """Find where keys and values go: part of the pass, for the numbers may have changed on the device."""
        self.where = self.cache.where(self.slots, self.positions)

    def attend(self, layer: int, query: Tensor, scale: float | None, window: int | None) -> Tensor:
        """query (1, H, T, D) → (1, T, H, D), for the model's own blocks."""
        q = query[0].transpose(0, 1)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return self.attend_heads(layer, q.flatten(1).contiguous(), scale, window, None)[0].view(1, *q.shape)

    def attend_heads(
        self, layer: int, q: Tensor, scale: float, window: int | None, A: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """q (T, H·D) → the heads' outputs (T, H·D), and parts of h for the A that reads them."""
        raise NotImplementedError

    def _send(self, numbers: Tensor, weights: Tensor) -> None:
        """Both from host memory, pinned where the batch is on a GPU."""
        for own, new in ((self.numbers, numbers), (self.weights, weights)):
            if new.numel():
                own.copy_(new.pin_memory() if own.is_cuda else new, non_blocking=True)


class StaticRows(Static):
    """B rows of one token each: what `Tokens` and `Rows` are on the CPU. `tiling`: tiles of a use, and rows of one."""

    def __init__(self, cache: SlotCache, rows: int, room: int, tiling: tuple[int, int], device: torch.device) -> None:
        self.count, self.size = tiling
        shape = max(1, room), self.count, 1 + self.size
        super().__init__(cache, rows, [math.prod(shape)], rows * room, device)
        self.room, self.keep = room, 0
        self.body = self.head = Tiles(self.tables[0].fill_(-1).view(shape), self.weights.view(rows, room))

    def send(self, rows: Sequence[tuple[int, int, int, Uses]]) -> None:
        """(slot, position, token, adapters) of each row."""
        padding = len(self.ids) - len(rows)
        numbers = [token for _, _, token, _ in rows] + [0] * padding
        numbers += [position for _, position, _, _ in rows] + [0] * padding
        numbers += [slot for slot, *_ in rows] + [self.spare] * padding
        places = [[place for place, _ in uses] for *_, uses in rows] + [[]] * padding
        numbers += served.tile_rows(places, max(1, self.room), self.size, self.count)
        weights = [_padded(uses, self.room) for *_, uses in rows] + [[0.0] * self.room] * padding
        self._send(torch.tensor(numbers), torch.tensor(weights).flatten())

    def attend_heads(
        self, layer: int, q: Tensor, scale: float, window: int | None, A: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """In parts of each slot, gathered by tiles."""
        keys, values = self.cache.store[layer]
        heads = q.view(len(q), keys.shape[1], -1, keys.shape[3])
        parts = served_attention.attend_parts(heads, keys, values, self.slots, self.positions, scale, window)
        return served_attention.gather(parts, self.table, A, q)


class StaticPieces(Static):
    """T tokens of up to `most` pieces of prompts, of which as many may end: what `Prompts` and `Segments` are elsewhere."""

    def __init__(self, cache: SlotCache, rows: int, room: int, most: int, device: torch.device) -> None:
        ends = min(rows, most)
        attention = served_prompts.most_tiles(rows, most, served_prompts.QUERIES), 4
        body = max(1, room), served_prompts.most_tiles(rows, most + 1, served_prompts.ROWS), 1 + served_prompts.ROWS
        head = room, ends, 1 + served.ROWS
        sizes = [ends, *(math.prod(shape) for shape in (attention, body, head))]
        super().__init__(cache, rows, sizes, (rows + ends) * room, device)
        self.room, (self.keep, *tables) = room, self.tables
        self.tiles, body, head = (table.view(shape) for table, shape in zip(tables, (attention, body, head)))
        body_weights, head_weights = self.weights.view(rows + ends, room).split([rows, ends])
        self.body, self.head = Tiles(body.fill_(-1), body_weights), Tiles(head.fill_(-1), head_weights)

    def send(self, pieces: Sequence[tuple[int, int, list[int], Uses]], last: Sequence[bool]) -> None:
        """(slot, position of the first token, tokens, adapters) of each piece, and whether its prompt ends with it."""
        counts = torch.tensor([len(tokens) for _, _, tokens, _ in pieces])
        stops = counts.cumsum(0)
        ends = [(stop - 1, uses) for stop, (*_, uses), end in zip(stops.tolist(), pieces, last) if end]
        padding, spare = len(self.ids) - int(stops[-1]), len(self.keep) - len(ends)
        starts, slots = (torch.tensor([piece[n] for piece in pieces]) for n in (1, 0))
        ids = [token for _, _, tokens, _ in pieces for token in tokens] + [0] * padding
        within = torch.arange(int(stops[-1])) - (stops - counts).repeat_interleave(counts)
        pad = torch.nn.functional.pad
        runs = [
            (stop - count, stop, [place for place, _ in uses])
            for stop, count, (*_, uses) in zip(stops.tolist(), counts.tolist(), pieces)
        ]
        # Padding is a run too: a base with one scale for all rows sees what is in them.
        runs.append((int(stops[-1]), len(ids), []))
        head = served.tile_rows([[place for place, _ in uses] for _, uses in ends] + [[]] * spare, self.room)
        numbers = [
            torch.tensor(ids),
            pad(starts.repeat_interleave(counts) + within, (0, padding)),
            pad(slots.repeat_interleave(counts), (0, padding), value=self.spare),
            torch.tensor([end for end, _ in ends] + [0] * spare),
            served_prompts.piece_tiles([(slot, at, len(t)) for slot, at, t, _ in pieces], len(self.tiles)).flatten(),
            served_prompts.use_tiles(runs, max(1, self.room), self.body.tiles.shape[1]).flatten(),
            torch.tensor(head, dtype=torch.int64),
        ]
        body = torch.tensor([_padded(uses, self.room) for *_, uses in pieces]).repeat_interleave(counts, 0)
        tail = torch.tensor([_padded(uses, self.room) for _, uses in ends] + [[0.0] * self.room] * spare)
        self._send(torch.cat(numbers), torch.cat([pad(body, (0, 0, 0, padding)), tail]).flatten())

    def attend_heads(
        self, layer: int, q: Tensor, scale: float, window: int | None, A: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """In tiles of each piece."""
        keys, values = self.cache.store[layer]
        heads = q.view(len(q), -1, keys.shape[3])
        y = served_prompts.attend_pieces(heads, keys, values, self.tiles, scale, window).flatten(1)
        return y, None if A is None else served.shrink(y, A, self.table.tiles[None]).squeeze(1)


def _padded(uses: Uses, room: int) -> list[float]:
    return [weight for _, weight in uses] + [0.0] * (room - len(uses))

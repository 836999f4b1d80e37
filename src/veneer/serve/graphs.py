"""Decoding on a GPU: a step is one captured CUDA graph for each number of rows, over buffers that stay where they are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels import served
from veneer.serve.cache import SlotCache
from veneer.serve.pool import Stack
from veneer.serve.registry import Registry
from veneer.serve.routing import Uses
from veneer.serve.runner import Runner

STACKED = (0, 1, 2, 4, 8)
"""How many adapters of a row a graph has room for."""


@dataclass
class StaticRows:
    """B rows at fixed addresses: what `Tokens` and `Rows` are on the CPU, read by kernels from device memory."""

    cache: SlotCache
    ids: Tensor
    positions: Tensor
    slots: Tensor
    tiles: Tensor
    """(U, B, 1 + ROWS) int64, as `served.tile_rows` makes them."""
    weights: Tensor
    """(B, U) float32."""

    where: Tensor | None = None
    """Where its keys and values go, found anew at the start of a step."""

    def attend(self, layer: int, query: Tensor, scale: float | None, window: int | None) -> Tensor:
        """query (1, H, B, D) → (1, B, H, D)."""
        heads = self.cache.store.shape[3]
        q = query[0].transpose(0, 1).unflatten(1, (heads, -1)).contiguous()
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        keys, values = self.cache.store[layer]
        return served.attend(q, keys, values, self.slots, self.positions, scale, window).flatten(1, 2).unsqueeze(0)

    def shrink(self, x: Tensor, stack: Stack) -> Tensor:
        """(N, U, B, n·R) float32."""
        return served.shrink(x.contiguous(), stack.A, self.tiles)

    def expand(self, hidden: Tensor, stack: Stack, ys: Sequence[Tensor]) -> None:
        """Each y += its update, in place."""
        served.expand(hidden, stack.B, self.tiles, self.weights, ys)


@dataclass
class Step:
    """A captured step: its rows, and the logits it leaves (None before it is captured)."""

    rows: StaticRows
    numbers: Tensor
    """tiles, ids, positions and slots in one piece, for one copy."""
    graph: Any = None
    logits: Tensor | None = None


class GraphRunner(Runner):
    """`Runner` with captured steps. Padding rows read and write a slot of their own, the last."""

    lookahead = power_ranks = True

    def __init__(self, model: Any, registry: Registry, slots: int, context: int) -> None:
        self.buckets = sorted({*(b for b in (1, 8, 16, 32, 64, 128, 256) if b < slots), slots})
        self.steps: dict[tuple[int, int], Step] = {}
        self.version, self.captures = 0, registry.device.type == "cuda"
        self._memory = self._last = None
        super().__init__(model, registry, slots, context)

    def _slots(self, slots: int) -> int:
        return slots + 1

    def prepare(self) -> None:
        """Besides, capture every number of rows, without adapters and (if there are any) with one a row."""
        super().prepare()
        for room in (0, 1) if self.pool.stacks else (0,):
            for bucket in self.buckets:
                self._step(bucket, room)

    @torch.inference_mode()
    def tokens(self, rows: Sequence[tuple[int, int, int, Uses]], ahead: Tensor | None = None) -> Tensor:
        """As `Runner.tokens`; the logits are overwritten by the next step.

        With `ahead` (B) the tokens are those, on the device, and the rows are those of the step before, one further.
        """
        bucket = next(b for b in self.buckets if b >= len(rows))
        room = next(u for u in STACKED if u >= max(len(uses) for *_, uses in rows))
        step = self._step(bucket, room)
        if ahead is not None and step is self._last:
            step.rows.positions[: len(rows)].add_(1)
        else:  # other rows, or the same in another place because the pool has moved
            self._send(step, rows, bucket, room)
        if ahead is not None:
            step.rows.ids[: len(rows)].copy_(ahead)
        self._last = step
        if step.graph is None:
            step.logits = self._run(step, room)
        else:
            step.graph.replay()
        return step.logits[: len(rows)]

    def _send(self, step: Step, rows: Sequence[tuple[int, int, int, Uses]], bucket: int, room: int) -> None:
        padding = bucket - len(rows)
        places = [[place for place, _ in uses] for *_, uses in rows] + [[]] * padding
        numbers = served.tile_rows(places, room)
        numbers += [token for _, _, token, _ in rows] + [0] * padding
        numbers += [position for _, position, _, _ in rows] + [0] * padding
        numbers += [slot for slot, *_ in rows] + [self.slots] * padding
        step.numbers.copy_(torch.tensor(numbers, pin_memory=self.captures), non_blocking=True)
        if room:
            weights = [w for *_, uses in rows for w in [weight for _, weight in uses] + [0.0] * (room - len(uses))]
            weights += [0.0] * (room * padding)
            step.rows.weights.copy_(
                torch.tensor(weights, pin_memory=self.captures).view(bucket, room), non_blocking=True
            )

    def _step(self, bucket: int, room: int) -> Step:
        if self.version != self.pool.version:  # the pool moved: what was captured reads its old addresses
            self.version = self.pool.version
            self.steps = {key: step for key, step in self.steps.items() if key[1] == 0}
            if not self.steps:
                self._memory = None  # memory of graphs that are all gone cannot be captured into again
        if (bucket, room) not in self.steps:
            self.steps[bucket, room] = self._make(bucket, room)
        return self.steps[bucket, room]

    @torch.inference_mode()
    def _make(self, bucket: int, room: int) -> Step:
        shape = room, bucket, 1 + served.ROWS
        numbers = torch.zeros(math.prod(shape) + 3 * bucket, dtype=torch.int64, device=self.device)
        tiles, ids, positions, slots = numbers.split([math.prod(shape), bucket, bucket, bucket])
        slots.fill_(self.slots), tiles.fill_(-1)
        weights = torch.zeros(bucket, room, device=self.device)
        rows = StaticRows(self.cache, ids, positions, slots, tiles.view(shape), weights, torch.zeros_like(slots))
        step = Step(rows, numbers)
        if self.captures:
            try:
                self._capture(step, room)
            except RuntimeError as error:
                self.captures, step.graph = False, None
                warnings.warn(f"decoding runs without CUDA graphs: {str(error).splitlines()[0]}", stacklevel=2)
        return step

    def _capture(self, step: Step, room: int) -> None:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled and workspaces made outside the capture
                self._run(step, room)
        torch.cuda.current_stream(self.device).wait_stream(side)
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._memory, capture_error_mode="thread_local"
        ):  # other threads read adapters
            step.logits = self._run(step, room)
        step.graph = graph

    def _run(self, step: Step, room: int) -> Tensor:
        self.routing.body = self.routing.head = step.rows if room else None
        step.rows.where = self.cache.where(step.rows.slots, step.rows.positions)
        return self._forward(step.rows.ids, step.rows, 0)

"""Serving on a GPU: a pass over the model is one captured CUDA graph for each number of rows, over static batches."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.served import ROWS
from veneer.serve.block import ServedBlock, served_blocks
from veneer.serve.registry import Registry
from veneer.serve.routing import Uses
from veneer.serve.runner import Piece, Runner
from veneer.serve.static import StaticPieces, StaticRows

STACKED = (0, 1, 2, 4, 8)
"""How many adapters of a row a graph has room for."""
WRITING = (1, 8, 16, 32, 64, 128, 256)
"""Rows of a decoding step's graph; the engine's number of slots besides."""
READING = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens of prompts in a pass's graph: no two neighbours are further apart than half, for padding costs as much."""

SHARES = (6, 3)
"""A step is dealt into a sixth as many tiles as it has rows, into a third, or, if that is not enough, into one for each
row: tiles that stay empty cost, and so do single rows that read what they could share."""

WHAT = {StaticRows: "writes answers", StaticPieces: "reads prompts"}


@dataclass
class Step:
    """A pass: its batch, and its graph once it is captured."""

    batch: StaticRows | StaticPieces
    graph: Any = None


class GraphRunner(Runner):
    """`Runner` with captured passes. Padding rows read and write a slot of their own, the last."""

    lookahead = power_ranks = fuses = True
    most = READING[-1]

    def __init__(self, model: Any, registry: Registry, slots: int, context: int) -> None:
        self.buckets = {StaticRows: sorted({*(b for b in WRITING if b < slots), slots}), StaticPieces: READING}
        self.steps: dict[tuple[type, int, int, int, int], Step] = {}
        """By kind, bucket, room, tiles and rows of one."""
        self.version = 0
        self.captures = {*self.buckets} if registry.device.type == "cuda" else set()
        """The kinds of batch whose passes are captured."""
        self._memory = self._last = self._logits = None
        self._streams: tuple[Any, ...] = ()
        self.fused = False
        super().__init__(model, registry, slots, context)

    def _slots(self, slots: int) -> int:
        return slots + 1

    def _install(self) -> None:
        """Besides, blocks of known models become `ServedBlock`s."""
        blocks = served_blocks(self.model, self.pool) if self.fuses else {}
        super()._install()  # after the blocks have taken the base's own linears
        for name, block in blocks.items():
            self._replace(name, block)
            if isinstance(block, ServedBlock):
                block.join()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()  # of its old weights, which are too small to be used for the next one's
        self.fused = bool(blocks)

    def prepare(self) -> None:
        """Besides, capture every number of rows, without adapters and (if there are any) with one a row."""
        super().prepare()
        for room in (0, 1) if self.pool.stacks else (0,):
            for kind, buckets in self.buckets.items():
                for bucket in buckets:
                    for tiling in self._tilings(kind, bucket, room):
                        self._step(kind, bucket, room, *tiling)

    @torch.inference_mode()
    def prompts(self, pieces: Sequence[Piece], last: Sequence[bool]) -> Tensor | None:
        """As `Runner.prompts`; the logits are overwritten by the next pass."""
        step = self._step_for(StaticPieces, sum(len(tokens) for _, _, tokens, _ in pieces), pieces)
        step.batch.send(pieces, last)
        logits = self._run(step)
        return logits[: sum(last)] if any(last) else None

    @torch.inference_mode()
    def tokens(self, rows: Sequence[tuple[int, int, int, Uses]], ahead: Tensor | None = None) -> Tensor:
        """As `Runner.tokens`; the logits are overwritten by the next step.

        With `ahead` (B) the tokens are those, on the device, and the rows are those of the step before, one further.
        """
        step = self._step_for(StaticRows, len(rows), rows)
        if ahead is not None and step is self._last:
            step.batch.positions[: len(rows)].add_(1)
        else:  # other rows, or the same in another place because the pool has moved
            step.batch.send(rows)
        if ahead is not None:
            step.batch.ids[: len(rows)].copy_(ahead)
        self._last = step
        return self._run(step)[: len(rows)]

    def _run(self, step: Step) -> Tensor:
        if step.graph is None:
            self._pass(step.batch)
        else:
            step.graph.replay()
        return self._logits

    def _step_for(self, kind: type, rows: int, users: Sequence[tuple[Any, ...]]) -> Step:
        bucket = next(b for b in self.buckets[kind] if b >= rows)
        room = next(u for u in STACKED if u >= max(len(uses) for *_, uses in users))
        every = self._tilings(kind, bucket, room)
        tiling = every[-1] if len(every) == 1 else dealt(every, bucket, [uses[0][0] for *_, uses in users if uses])
        return self._step(kind, bucket, room, *tiling)

    def _tilings(self, kind: type, rows: int, room: int) -> list[tuple[int, int]]:
        """How a batch may be dealt, the last way whatever its adapters: tiles of a use, and rows of one."""
        if kind is StaticPieces or not self.fused or room > 1:
            return [(rows, ROWS)]
        if room == 0:
            return [(-(-rows // ROWS), ROWS)]
        return [(rows // share, ROWS) for share in SHARES if rows >= share] + [(rows, 1)]

    def _step(self, kind: type, bucket: int, room: int, count: int, size: int) -> Step:
        if self.version != self.pool.version:  # the pool moved: what was captured reads its old addresses
            self.version = self.pool.version
            if self.captures:
                torch.cuda.synchronize(self.device)  # a pass in flight is over before its graph goes
            self.steps = {key: step for key, step in self.steps.items() if key[2] == 0}
            self._last = None
            if not self.steps:
                self._memory = None  # memory of graphs that are all gone cannot be captured into again
        key = kind, bucket, room, count, size
        if key not in self.steps:
            self.steps[key] = self._make(*key)
        return self.steps[key]

    @torch.inference_mode()
    def _make(self, kind: type, bucket: int, room: int, count: int, size: int) -> Step:
        most = self.slots if kind is StaticPieces else (count, size)
        step = Step(kind(self.cache, bucket, room, most, self.device))
        step.batch.fused = self.fused and room <= 1
        if kind in self.captures:
            try:
                self._capture(step)
            except Exception as error:  # noqa: BLE001 a model that cannot be captured, or a kernel too large for this GPU
                self.captures.discard(kind)
                what, reason = WHAT[kind], str(error).partition("\n")[0] or type(error).__name__
                warnings.warn(f"serving {what} without CUDA graphs: {reason}", stacklevel=2)
        return step

    def _capture(self, step: Step) -> None:
        """With the same two streams for all graphs: cuBLAS keeps a workspace for each stream that it was ever used on."""
        here = torch.cuda.current_stream(self.device)
        self._streams = self._streams or (torch.cuda.Stream(self.device), torch.cuda.Stream(self.device))
        side, capturing = self._streams
        with torch.cuda.stream(here):  # which a capture that fails would leave another
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(2):  # kernels are compiled outside the capture
                    self._pass(step.batch)
            here.wait_stream(side)
            self._memory = self._memory or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            options = {"pool": self._memory, "stream": capturing}
            with torch.cuda.graph(graph, **options, capture_error_mode="thread_local"):  # other threads read adapters
                self._pass(step.batch)
        step.graph = graph

    def _pass(self, batch: StaticRows | StaticPieces) -> None:
        """Leaves the logits in one place for all passes: a place for each graph would be gigabytes."""
        self.routing.body, self.routing.head = (batch.body, batch.head) if batch.room else (None, None)
        if not batch.fused:  # whole blocks find the places themselves
            batch.locate()
        logits = self._forward(batch.ids, batch, batch.keep)
        if self._logits is None:
            self._logits = logits.new_empty(self.slots, logits.shape[1])
        self._logits[: len(logits)].copy_(logits)


def dealt(tilings: Sequence[tuple[int, int]], rows: int, places: Sequence[int]) -> tuple[int, int]:
    """The first tiling with room for a batch of `rows` of which some have an adapter, at these places."""
    own = Counter(places)
    own[-1] = rows - len(places)  # those without one, and padding, are one more's
    needed = sum(-(-n // ROWS) for n in own.values())
    return next((count, size) for count, size in tilings if size == 1 or count >= needed)


class OwnBlocks(GraphRunner):
    """`GraphRunner` over the model's own blocks: for a GPU on which the kernels of whole ones are wrong."""

    fuses = False

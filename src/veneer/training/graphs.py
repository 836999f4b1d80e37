"""A row's forward and backward pass as one CUDA graph: small models wait for launches more than for arithmetic.

A graph replays fixed shapes at fixed addresses, so rows are padded to a few sizes; a padded token is a segment of its
own without a target, which changes nothing of the others. A size is run plainly once, then captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.config import OptimConfig
from veneer.data.pack import Row, Segment
from veneer.kernels.attention import Layout
from veneer.training.accelerate import Accelerated
from veneer.training.forward import RowModel, segments_of
from veneer.training.store import SENT

MOST = 24
"""Sizes that are captured; rows of any further size run plainly."""


def padded(row: Row, tokens: int, targets: int) -> Row:
    """A row with as many tokens and targets: the new tokens are a segment of their own, the new targets −1."""
    more, missing = tokens - len(row.input_ids), targets - len(row.targets)
    if not more and not missing:
        return row
    start = len(row.input_ids)
    last = (Segment(start, tokens, 0, 0),) if more else ()
    return Row(
        np.pad(row.input_ids, (0, more)),
        np.concatenate([row.position_ids, np.arange(more)]),
        np.pad(row.predictors, (0, missing)),
        np.pad(row.targets, (0, missing), constant_values=-1),
        row.segments + last,
    )


def rounded(count: int) -> int:
    """A count rounded up to the next eighth of the power of two at or above it, at least 16: at most a quarter more."""
    step = max(16, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


class Captured:
    """One graph with the tensors that it reads and writes."""

    def __init__(self, tensors: tuple[Tensor, ...], layout: Layout, weight: Tensor) -> None:
        self.tensors, self.layout, self.weight = tensors, layout, weight
        self.graph = torch.cuda.CUDAGraph()
        self.loss: Tensor | None = None

    def fill(self, row: Row, layout: Layout, weight: float) -> None:
        """Put a row in place."""
        for place, part in zip(self.tensors, (row.input_ids, row.position_ids, row.predictors, row.targets)):
            place.copy_(torch.from_numpy(part), non_blocking=True)
        self.layout.cu_q.copy_(layout.cu_q, non_blocking=True)
        self.layout.cu_k.copy_(layout.cu_k, non_blocking=True)
        self.weight.fill_(weight)


class RowGraphs:
    """`backward(row, weight)` for rows of `rows`, through CUDA graphs where that can be.

    It cannot where blocks offload, where rows share prefixes, or where capturing fails, which is told once through
    `note`.
    """

    def __init__(self, rows: RowModel, fast: Accelerated, config: OptimConfig, note: Callable[[str], None]) -> None:
        self.rows, self.fast, self.note = rows, fast, note
        self.possible = (
            config.cuda_graphs == "auto"
            and fast.device.type == "cuda"
            and rows.packing
            and rows.varlen
            and rows.fast_head
            and not any(mode in SENT for mode in fast.modes)
        )
        self.seen: set[tuple] = set()
        self.graphs: dict[tuple, Captured] = {}
        self.pool: Any = None

    def backward(self, row: Row, weight: float) -> Tensor:
        """Add the gradients of weight × the row's summed loss; returns the loss, a float32 scalar."""
        if not self.possible or any(s.prefix_end > s.prefix_start for s in row.segments):
            return self._plain(row, weight)
        tokens = rounded(len(row.input_ids))
        row = padded(row, tokens, min(rounded(len(row.targets)), max(tokens, len(row.targets))))
        layout = Layout.of(segments_of(row), torch.device("cpu"))
        key = (len(row.input_ids), len(row.targets), len(layout.cu_q), layout.longest_q, layout.equal)
        key += (len(row.segments) > 1,)
        if key not in self.graphs:
            if key not in self.seen or len(self.graphs) >= MOST:
                self.seen.add(key)
                return self._plain(row, weight)
            if not self._capture(key, row, layout):
                return self._plain(row, weight)
        captured = self.graphs[key]
        captured.fill(row, layout, weight)
        captured.graph.replay()
        return captured.loss.clone()

    def _plain(self, row: Row, weight: float) -> Tensor:
        with self.rows.row(row) as loss:
            (loss * weight).backward()
        return loss.detach()

    def _capture(self, key: tuple, row: Row, layout: Layout) -> bool:
        device = self.fast.device
        tensors = tuple(
            torch.from_numpy(part).to(device) for part in (row.input_ids, row.position_ids, row.predictors, row.targets)
        )
        place = replace(layout, cu_q=layout.cu_q.to(device), cu_k=layout.cu_k.to(device))
        captured = Captured(tensors, place, torch.ones((), device=device))
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what plain steps have cached is of no use to the graph's own pool
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(captured.graph, pool=self.pool, capture_error_mode="thread_local"):
                loss = self.rows.tensor_loss(*tensors, place, len(row.segments) > 1)
                (loss * captured.weight).backward()
                captured.loss = loss.detach()
        except RuntimeError as error:
            self.possible = False
            self.note(f"steps run without CUDA graphs: {str(error).strip().splitlines()[0]}")
            return False
        self.graphs[key] = captured
        return True

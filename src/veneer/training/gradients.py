"""The gradients of a batch, within memory: rows, the blocks as the dial says, and the way down when memory runs out."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from veneer.config import TrainConfig
from veneer.data.example import TokenizedExample
from veneer.data.pack import Row
from veneer.plan.fit import Plan
from veneer.training import budget
from veneer.training.accelerate import Accelerated, use_compile
from veneer.training.flat import FlatOptimizer
from veneer.training.forward import RowModel
from veneer.training.graphs import RowGraphs
from veneer.training.setup import Setup
from veneer.training.streamed import StreamedRows


class Gradients:
    """Adds up gradients of batches in an optimiser's buffers; `row_tokens` are the most of a row.

    `stop` says that the user interrupted. Blocks run as the dial says inside of `running`.
    """

    def __init__(
        self,
        setup: Setup,
        config: TrainConfig,
        plan: Plan | None,
        optimizer: FlatOptimizer,
        note: Callable[[str], None],
        stop: Callable[[], Any],
    ) -> None:
        self.setup, self.config, self.plan = setup, config, plan
        self.optimizer, self.note, self.stop = optimizer, note, stop
        train = config.train
        self.device, self.streamed = optimizer.buffers[0].device, train.stream != "off"
        self.row_tokens = train.micro_batch_tokens
        self.fast = self._accelerated(train.checkpointing, train.keep_blocks) if self.streamed else None
        self.rows = self.fast if self.streamed else RowModel(setup.model, packing=train.pack != "off")
        few = [setup.train[i] for i in range(min(8, len(setup.train)))]
        self.rows.check(few, required=train.pack == "on")
        for line in self.rows.notes:
            note(line)
        self.fast = self.fast or self._accelerated(train.checkpointing, train.keep_blocks)
        self.graphs = self._graphs()
        self.longest = setup.counts["train"].longest
        self.ways_down = budget.ways_down(config, plan, self.device.type == "cuda", self.longest)

    def _accelerated(self, dial: str, keep: int = 0) -> Accelerated | StreamedRows:
        """The blocks with a setting of the dial; of a streamed base with the rows."""
        train = self.config.train
        options = {"modes": dial, "keep": keep, "compile": use_compile(train.compile, self.device), "note": self.note}
        if self.streamed:
            return StreamedRows(self.setup.model, packing=train.pack != "off", **options)
        return Accelerated(self.setup.model, **options)

    def _graphs(self, short: bool = False) -> RowGraphs | None:
        """CUDA graphs of rows, where there is room for what they hold besides: the plan says so, and memory is not `short`.
        A streamed base has none."""
        if self.streamed:
            return None
        train, plan = self.config.train, self.plan
        if short or (plan is not None and not plan.chosen.setting.graphs):
            train = train.model_copy(update={"cuda_graphs": "off"})
        return RowGraphs(self.rows, self.fast, train, self.note)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model as training wants it, held to its budget; its longest rows are tried first."""
        with budget.hold(self.config.train.vram, self.device, self.plan), self.rows.attention():
            self.fast.__enter__()
            try:
                self.try_longest()
                yield
            finally:
                self.fast.__exit__(*sys.exc_info())

    def try_longest(self) -> None:
        """The longest rows that may come, forward and backward, their gradients thrown away: trouble shows at once.

        On a CPU only with a budget: there memory runs out slowly, and a row takes its time.
        """
        train = self.config.train
        if self.device.type == "cuda" or train.vram is not None:
            self.of(budget.longest_batch(self.setup.train, train.batch_size), 0, longest=True)
            self.optimizer.zero_grad()

    def of(
        self, examples: Sequence[TokenizedExample], seed: int, *, longest: bool = False
    ) -> tuple[list[Row], float] | None:
        """The rows and the mean loss of a batch, whose gradients are in the buffers; None if interrupted.

        `seed` is that of dropout. `longest`: of the longest row alone, on a resident base. Where memory runs out, the
        next setting down is taken and the batch is begun anew.
        """
        while True:
            torch.manual_seed(seed)
            rows = self.rows.pack(examples, self.row_tokens, self.config.train.share_prefix)
            if longest and not self.streamed:
                rows = [max(rows, key=lambda row: len(row.input_ids))]
            supervised = sum(len(row.targets) for row in rows)
            self.optimizer.zero_grad()
            try:
                losses = self.backward(rows, supervised)
                return None if losses is None else (rows, float(sum(losses)) / supervised)
            except (RuntimeError, MemoryError) as error:
                if not budget.is_out_of_memory(error):
                    raise
                trouble = error.with_traceback(None)
            self.step_down(trouble)  # not in the handler, which holds the failed step's tensors

    def backward(self, rows: list[Row], supervised: int) -> list[Tensor] | None:
        """The loss of each row, with the gradients of their mean added to the parameters'; None if interrupted."""
        if self.streamed:
            return self.rows.backward(rows, supervised, self.stop)
        losses: list[Tensor] = []
        for row in rows:
            if self.stop():
                return None
            self.fast.start(unchanged=bool(losses))
            losses.append(
                self.graphs.backward(row, 1 / supervised)
            )  # read after the last row: the device need not wait
        return losses

    def step_down(self, error: BaseException) -> None:
        """Take the next setting that needs less memory. Raises `RunError` where there is none."""
        if not self.ways_down:
            raise budget.exhausted(error, self.longest) from None
        (dial, self.row_tokens), *self.ways_down = self.ways_down
        passing = ", no blocks stay on the device" if self.streamed and self.fast.base.conveyor.stay else ""
        self.note(
            f"warning: out of memory: from here on checkpointing {dial} and rows of {self.row_tokens:,} tokens{passing}; the "
            f"step is done again ({str(error).splitlines()[0][:100]})"
        )
        release(self.device)  # a streamed base makes its buffers anew
        before = self.fast
        before.__exit__(None, None, None)
        if self.streamed:
            before.base.conveyor.let_pass()
        self.optimizer.zero_grad()
        self.fast = self._accelerated(dial)
        if self.streamed:
            self.fast.packing, self.fast.fast_head = before.packing, before.fast_head
            self.rows = self.fast
        self.graphs = self._graphs(short=True)
        del before
        release(self.device)
        self.fast.__enter__()


def release(device: torch.device) -> None:
    """Free what a step that failed in its midst left on the device.

    Checkpoints' frames are cycles, and autograd's engine holds the graph of a backward pass that failed until the same
    thread begins another.
    """
    for finish in (lambda: None, lambda: torch.zeros(1, device=device, requires_grad=True).sum().backward()):
        finish()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

"""Many adapters in training on one frozen base: each pass takes a row of every one, and each product with a frozen
weight all their tokens at once.

An adapter here is an ordinary run (`Lane` is a `Trainer`): its own data order, schedule, optimiser, metrics, checkpoints
and directory. Only the passes are shared, and in them tokens of different adapters never meet: attention keeps the
sequences of a packed row apart, the adapters act on their own tokens (`Bank.route_tokens`), and each loss is divided by
its own supervised tokens. So each ends where it would have ended alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from veneer.adapter.attach import get_bank
from veneer.adapter.init import DATA_DRIVEN
from veneer.adapter.layers import Stream
from veneer.config import TrainConfig
from veneer.data.pack import Row, join
from veneer.errors import TrainingDiverged
from veneer.training.accelerate import Accelerated, draws_random, use_compile
from veneer.training.evaluate import heldout_loss
from veneer.training.forward import RowModel
from veneer.training.loop import Batch, Observer, RunResult, Trainer, unsound
from veneer.training.lower import SharedStart
from veneer.training.optim import lr_factor, set_lr, warmup_steps
from veneer.training.setup import Setup
from veneer.training.state import Progress, checkpoint_path, save_checkpoint

Status = Literal["finished", "early", "interrupted", "diverged", "paused"]


class Lane(Trainer):
    """One of the adapters of a `Pool`. With `alone`, its rows go through the model by themselves, as in `Trainer`."""

    def __init__(self, config: TrainConfig, name: str, setup: Setup, observe: Observer, *, alone: bool = False) -> None:
        super().__init__(config, observe=observe, name=name, setup=setup)
        self.alone = alone
        self.state = Progress()
        self.status: Status | None = None
        """How it left the pool; None before."""
        self.reason = ""
        self.loss: float | None = None
        self.until: int | None = None
        """Pause after this step."""
        self.rung_loss: float | None = None
        self.result: RunResult | None = None
        self.losses: list[Tensor] = []
        self.batch: Batch | None = None
        self.shared: LaneRows | None = None
        self.stream: Stream | None = None

    def open(self, resume: bool) -> None:
        """Put the adapter on the model, at its start or where its newest checkpoint left it."""
        setup, self.state = self._open(resume)
        self.total = setup.total_steps(self.config.train)
        self.warmup = warmup_steps(self.config.train.warmup, self.total)
        self.started = time.monotonic() - self.state.seconds
        self.observe({"type": "start", "step": self.state.step, "total_steps": self.total})

    def _ready(self, setup: Setup) -> None:
        if self.alone:
            super()._ready(setup)

    @property
    def rows(self) -> Any:
        return super().rows if self.alone else self.shared

    @property
    def row_tokens(self) -> int:
        return super().row_tokens if self.alone else self.config.train.micro_batch_tokens

    @property
    def done(self) -> bool:
        """Whether no step is left for now."""
        return self.state.stopped_early or self.state.step >= min(self.total, self.until or self.total)

    def set_rate(self) -> None:
        """The learning rate of the next step."""
        options = self.config.train
        set_lr(self.optimizer, options.lr * lr_factor(self.state.step + 1, self.total, self.warmup, options.schedule))

    def begin(self) -> None:
        """Take the next step's batch."""
        self.set_rate()
        began, (indices, examples, seed) = time.monotonic(), self._examples(self.setup, self.state)
        rows = self.rows.pack(examples, self.row_tokens, self.config.train.share_prefix)
        self.batch = Batch(indices, examples, rows, sum(len(row.targets) for row in rows), seed, began)
        self.restart()

    def restart(self) -> None:
        """Forget the gradients of the batch in work."""
        self.optimizer.zero_grad()
        self.losses.clear()
        drops = any(self.name in layer.lora_dropout for layer in self.bank.layers.values())
        self.stream = Stream(self.batch.seed, next(self.model.parameters()).device) if drops else None

    @property
    def batch_loss(self) -> Tensor:
        """The batch's mean loss, once all its rows are through."""
        return sum(self.losses) / self.batch.supervised

    def end(self) -> None:
        """Update the adapter, log, evaluate and save what is due. Raises `TrainingDiverged`."""
        self.keep(self._update(self.setup, self.state, self.batch, float(self.batch_loss)))

    def keep(self, record: dict[str, Any]) -> None:
        """After a step: its record, and what is due."""
        self.loss, self.state.seconds = record["loss"], time.monotonic() - self.started
        self._after_step(self.setup, self.state, self.total, record)

    def rung(self) -> float:
        """The held-out loss now, logged; it does not count for best, early stopping or the schedule."""
        loss = heldout_loss(self.rows, self.setup.heldout, self.row_tokens, self.config.train.eval_examples)
        self._log({"type": "rung", "step": self.state.step, "loss": loss})
        return loss

    def leave(self, status: Status | None = None, reason: str = "") -> None:
        """Save what there is and take the adapter off the model."""
        if status is None:
            self.result = self._finish(self.setup, self.state, self.total, self.loss)
            self.setup.model.train()
            status = self.result.stopped
        elif status == "paused" and self.state.step:
            if self.until and self.done and self.setup.heldout:
                self.rung_loss = self.rung()
            if self.rung_loss is not None and not math.isfinite(self.rung_loss):
                status, reason, self.rung_loss = "diverged", unsound(self.rung_loss, self.state.step), None
            elif not checkpoint_path(self.out, self.state.step).exists():
                save_checkpoint(self.out, self.trained, self.state, self.config.train.keep_checkpoints)
        self.status, self.reason = status, reason
        self.observe({"type": "leave", "step": self.state.step, "status": status})
        self.metrics.close()
        self.bank.remove(self.name)
        del self.optimizer, self.trained, self.parameters, self.adalora, self.batch
        self.__dict__.pop("gradients", None)
        self.losses.clear()


def lone_reason(config: TrainConfig, device: torch.device) -> str | None:
    """Why a configuration cannot share passes with others; None if nothing in it speaks against it."""
    if config.train.stream != "off":
        return "its base is streamed"
    if config.train.pack == "off":
        return "train.pack is off"
    if config.adapter.new_tokens:
        return "it adds tokens to the vocabulary"
    if config.adapter.invocation:
        return "it acts from its invocation on (aLoRA), which is found by whole rows"
    if config.adapter.dropout and (config.train.checkpointing != "keep" or use_compile(config.train.compile, device)):
        return "its dropout draws its own random numbers, which recomputed and compiled blocks do not"
    return None


class LaneRows:
    """A `RowModel` for one adapter of a pool: its rows go through as in a pass, so that compiled blocks serve both."""

    def __init__(self, rows: RowModel, pool: Pool, lane: Lane) -> None:
        self.rows, self.pool, self.lane, self.model, self.pack = rows, pool, lane, rows.model, rows.pack

    @contextmanager
    def row(self, row: Row) -> Iterator[Tensor]:
        """`RowModel.row` with the adapter acting."""
        lengths = dict.fromkeys((lane.name for lane in self.pool.lanes), 0) | {self.lane.name: len(row.input_ids)}
        with get_bank(self.model).route_tokens(lengths), self.rows.row(row) as loss:
            yield loss

    losses = RowModel.losses


class Pool:
    """The adapters in training on one model; a `tick` is one optimiser step of each.

    `tokens` bounds a pass: rows of different adapters share one while they fit (a longer row goes by itself); absent,
    the largest `train.micro_batch_tokens`, so that activations take the memory of a single run's.
    """

    def __init__(
        self, model: torch.nn.Module, *, tokens: int | None = None, note: Callable[[str], None] = print
    ) -> None:
        self.model, self.note, self.wanted = model, note, tokens
        self.tokens = tokens or 0
        self.lanes: list[Lane] = []
        self.rows: RowModel | None = None
        self.lower: SharedStart | None = None
        self._stack = ExitStack()
        self.random = draws_random(model)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model its own attention and blocks back."""
        self._stack.close()
        self.rows = self.lower = None

    def add(self, lane: Lane, *, resume: bool) -> str | None:
        """Take an adapter in. Returns why it has to train by itself, if it does; then it is not taken in."""
        if self.random and not lane.alone:
            return "the base itself draws random numbers (dropout), which would differ from a run of its own"
        if lane.config.adapter.init in DATA_DRIVEN:  # it is computed with the model's own attention
            self.close()
        lane.open(resume)
        reason = None if lane.alone else lane.bank.lone(lane.name)
        if reason is None and self.rows is None:
            reason = self._start(lane)
        if reason is not None:
            lane.leave("paused", reason)
            return reason
        lane.bank.activate(lane.name if lane.alone else None)
        if not lane.alone:
            for one in (*self.lanes, lane):
                one.shared = LaneRows(self.rows, self, one)
            self.lower = SharedStart.of(self.model)
            self.tokens = self.wanted or max(self.tokens, lane.config.train.micro_batch_tokens)
        self.model.train()
        self.lanes = sorted([*self.lanes, lane], key=lambda one: one.name)  # compiled code knows their order
        return None

    def _start(self, lane: Lane) -> str | None:
        """Prepare the passes, with the first adapter there."""
        if lane.alone:
            self.rows = lane.rows
            lane.bank.activate(lane.name)
            self._stack.enter_context(lane.gradients.running())
            return None
        options = lane.config.train
        self.rows = RowModel(self.model)
        lane.bank.activate(lane.name)
        self.rows.check([lane.setup.train[i] for i in range(min(8, len(lane.setup.train)))])
        if not self.rows.packing:
            reason, self.rows = self.rows.notes[-1], None
            return reason
        for text in self.rows.notes:
            self.note(text)
        compiled = use_compile(options.compile, next(self.model.parameters()).device)
        self.fast = Accelerated(
            self.model, modes=options.checkpointing, keep=options.keep_blocks, compile=compiled, note=self.note
        )
        if compiled:  # each set of targets is code of its own, and above the limit blocks would run uncompiled
            self._stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
        self._stack.enter_context(self.rows.attention())
        self._stack.enter_context(self.fast)
        return None

    def tick(self) -> list[Lane]:
        """One step of every adapter; those that are done, have diverged or have to pause leave and are returned."""
        gone = self._leaving({})  # a resumed one may have no step left
        if self.lanes:
            failed = self._step_alone(self.lanes[0]) if self.lanes[0].alone else self._step()
            gone += self._leaving(failed)
        return gone

    def _leaving(self, failed: dict[Lane, str]) -> list[Lane]:
        gone = [lane for lane in self.lanes if lane in failed or lane.done]
        for lane in gone:
            if lane in failed:
                lane.leave("diverged", failed[lane])
            else:
                paused = lane.state.step < lane.total and not lane.state.stopped_early
                lane.leave("paused" if paused else None)
            self.lanes.remove(lane)
        return gone

    def _step_alone(self, lane: Lane) -> dict[Lane, str]:
        lane.set_rate()
        lane.bank.activate(lane.name)
        try:
            lane.keep(lane._step(lane.setup, lane.state, lane.total))
        except TrainingDiverged as error:
            return {lane: str(error)}
        return {}

    def _step(self) -> dict[Lane, str]:
        for lane in self.lanes:
            lane.begin()
        self._gradients()
        if len(self.lanes) > 1 and not self._finite():
            # On a GPU a NaN can pass through the stacked products (0·NaN): find whose it is, one by one.
            with torch.compiler.set_stance("force_eager"):
                for lane in self.lanes:
                    lane.restart()
                    for row in lane.batch.rows:
                        self._pass([(lane, row)], [lane])
        failed = {}
        for lane in self.lanes:
            try:
                lane.end()
            except TrainingDiverged as error:
                failed[lane] = str(error)
        return failed

    def _finite(self) -> bool:
        with torch.no_grad():
            found = [value for lane in self.lanes for value in (lane.batch_loss, lane.optimizer.norm())]
            return bool(torch.stack([value.to(found[0].device, torch.float32) for value in found]).isfinite().all())

    def _gradients(self) -> None:
        """Every adapter's gradients of its batch; a pass that does not fit into memory is split, from the start."""
        while True:
            try:
                for rows in passes([lane.batch.rows for lane in self.lanes], self.tokens):
                    self._pass([(self.lanes[i], row) for i, row in rows], self.lanes)
                return
            except torch.OutOfMemoryError:
                most = max(self._joint_sizes(), default=0)
                if not most:
                    raise
                self.tokens = most // 2
            torch.cuda.empty_cache()
            self.note(f"warning: a pass did not fit into memory: at most {self.tokens} tokens in one from here on")
            for lane in self.lanes:
                lane.restart()

    def _joint_sizes(self) -> list[int]:
        """The sizes of the passes that could be split."""
        joint = passes([lane.batch.rows for lane in self.lanes], self.tokens)
        return [sum(len(row.input_ids) for _, row in rows) for rows in joint if len(rows) > 1]

    def _pass(self, rows: Sequence[tuple[Lane, Row]], lanes: Sequence[Lane]) -> None:
        """Rows of some of the `lanes`, in their order, forward and backward."""
        lengths = dict.fromkeys((lane.name for lane in lanes), 0)
        lengths |= {lane.name: len(row.input_ids) for lane, row in rows}
        streams = {lane.name: lane.stream for lane, _ in rows if lane.stream is not None}
        joined = join([row for _, row in rows])
        self.fast.start()
        with get_bank(self.model).route_tokens(lengths, streams), self.lower.sharing([row for _, row in rows]) as start:
            with self.rows.row(joined, "none", start=start) as losses:
                sums = [part.sum() for part in losses.split([len(row.targets) for _, row in rows])]
                sum(loss / lane.batch.supervised for loss, (lane, _) in zip(sums, rows)).backward()
        for loss, (lane, _) in zip(sums, rows):
            lane.losses.append(loss.detach())


def passes(rows: Sequence[Sequence[Row]], tokens: int) -> list[list[tuple[int, Row]]]:
    """Which rows of several adapters go through the model together: at most one of each, `tokens` tokens in all.

    rows[i] are adapter i's, in order. Each pass holds (i, row) with i rising; a row above `tokens` goes by itself.
    """
    found: list[list[tuple[int, Row]]] = []
    for n in range(max((len(mine) for mine in rows), default=0)):
        used = math.inf
        for i, mine in enumerate(rows):
            if n < len(mine):
                size = len(mine[n].input_ids)
                if used + size > tokens:
                    found.append([])
                    used = 0
                found[-1].append((i, mine[n]))
                used += size
    return found

"""The training loop: a run directory in, an adapter out, and exact resume at every step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from veneer.adapter.attach import attach_blank, get_bank
from veneer.adapter.init import COMPUTED
from veneer.adapter.invocation import acting_tokens
from veneer.adapter.report import AttachReport
from veneer.base.host_embedding import embedding_to_host
from veneer.config import TrainConfig
from veneer.data.example import TokenizedExample
from veneer.data.pack import Row
from veneer.errors import DataError, RunError, TrainingDiverged, VeneerError
from veneer.files import claimed, write_text
from veneer.formats.peft import read_tensors, save_adapter
from veneer.plan.fit import Plan
from veneer.training import budget
from veneer.training.adalora import AdaLora, phases
from veneer.training.evaluate import heldout_loss
from veneer.training.flat import FlatOptimizer
from veneer.training.gradients import Gradients
from veneer.training.metrics import MetricsLog
from veneer.training.optim import correct_lora_fa, lr_factor, set_lr, warmup_steps
from veneer.training.setup import Setup, check_out, check_resumable, prepare_run
from veneer.training.signals import Interrupt
from veneer.training.state import (
    Progress,
    Trained,
    checkpoint_path,
    checkpoints,
    fill_adapter,
    load_checkpoint,
    save_checkpoint,
    saved_rows,
    tidy,
)
from veneer.training.streamed import check_adapters

Observer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RunResult:
    """What a run ended with. `stopped` is "finished", "early" (no gain any more) or "interrupted"."""

    path: Path
    adapter: Path
    steps: int
    total_steps: int
    loss: float | None
    best_loss: float | None
    seconds: float
    stopped: str


@dataclass(frozen=True)
class Batch:
    """What one step trains on: examples and their rows, how many supervised tokens, the seed of dropout, when it began."""

    indices: list[int]
    examples: list[TokenizedExample]
    rows: list[Row]
    supervised: int
    seed: int
    began: float


class Trainer:
    """Trains one adapter as a `TrainConfig` says, under `name` in the model's bank.

    `setup` is a base and data that are loaded already. `observe` is called with each record that metrics.jsonl gets, and
    with {"type": "note", "text": …}. After `run`, the adapted model is in `model` and its tokenizer in `tokenizer`.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        observe: Observer | None = None,
        name: str = "default",
        setup: Setup | None = None,
    ) -> None:
        self.config, self.observe, self.name = config, observe or (lambda record: None), name
        self.out = Path(config.out)
        self.setup = setup
        self.plan: Plan | None = None
        self._interrupted: Interrupt | int = Interrupt()

    def validate(self) -> Setup:
        """Load the base and the data and check everything that can be checked without training."""
        if self.setup is None:
            self.config, self.plan = budget.choose(self.config, self._note)
            self.setup = prepare_run(self.config, self._note)
            if self.config.adapter.adalora is not None:
                phases(self.config.adapter.adalora, self.setup.total_steps(self.config.train))
        return self.setup

    @property
    def model(self) -> torch.nn.Module:
        return self.validate().model

    @property
    def tokenizer(self) -> Any:
        return self.validate().tokenizer

    def dry_run(self) -> AttachReport:
        """Check everything that `run` checks before its first step, and write nothing. The adapter stays attached."""
        check_out(self.out)
        self._attach(self.validate(), resume=False)
        return self.report

    def run(self, *, resume: bool = False) -> RunResult:
        """Train from the start, or with `resume` from the newest sound checkpoint of the run directory.

        Raises `RunError` (directory in use or not resumable, disk full), `TrainingDiverged` (a loss or gradient is NaN or
        infinite; the batch, where it was one's, is kept in bad_batch.json), and what loading and data raise.
        """
        check_out(self.out, resume)
        with claimed(self.out):
            setup, state = self._open(resume)
            try:
                with self._interrupted, self.gradients.running():
                    return self._steps(setup, state)
            finally:
                self.metrics.close()

    def _open(self, resume: bool) -> tuple[Setup, Progress]:
        """Everything up to the first step: directory, data, adapter, checkpoint, metrics."""
        check_out(self.out, resume)
        tidy(self.out)
        if resume:
            self.config = budget.adopt(self.config, self.out)
        setup = self.validate()
        if resume:
            check_resumable(self.out, self.config, setup)
        self._attach(setup, resume)
        state = self._restore() if resume else Progress()
        if not resume:
            self._write_start(setup)
        self.metrics = MetricsLog(self.out, list(self.config.train.log_to))
        self.metrics.truncate_after(state.step)
        return setup, state

    def _attach(self, setup: Setup, resume: bool) -> None:
        torch.manual_seed(self.config.seed)
        rows = saved_rows(self.out) if resume and self.config.adapter.init in COMPUTED else None
        if rows is None:
            setup.attach(self.config, self.name)
        else:
            attach_blank(setup.model, self.config.adapter, rows, name=self.name, tokenizer=setup.tokenizer)
        bank = self.bank = get_bank(setup.model)
        streamed = self.config.train.stream != "off"
        if streamed:
            check_adapters(setup.model)
            setup.model.veneer_stream.settle()  # the adapter's factors were made beside the weights, on the host
        elif self.config.train.embedding == "host":
            embedding_to_host(setup.model)
        self.adalora = None
        if (adalora := self.config.adapter.adalora) is not None:
            self.adalora = AdaLora(bank, self.name, adalora, setup.total_steps(self.config.train), self.config.seed)
            if (times := self.adalora.allocations()) < 20:
                self._note(f"warning: AdaLoRA allocates ranks in only {times} steps, too few to know which matter")
        self.parameters = self.adalora.parameters() if self.adalora else bank.parameters(self.name)
        self.report: AttachReport = bank.report(self.name)
        self._note(str(self.report))
        if (invocation := bank.entries[self.name].config.invocation) is not None:
            self._check_invocation(setup, invocation)
        embeddings = [path for path, layer in bank.layers.items() if isinstance(layer.base_layer, torch.nn.Embedding)]
        self.optimizer = FlatOptimizer(self.parameters, self.config.train, embeddings)
        self.trained = Trained(setup.model, self.optimizer, self.adalora, self.name)
        self._ready(setup)
        setup.model.train()

    def _ready(self, setup: Setup) -> None:
        """How rows go through the model, how fast, and within what memory."""
        self.gradients = Gradients(setup, self.config, self.plan, self.optimizer, self._note, lambda: self._interrupted)

    @property
    def rows(self) -> Any:
        """How rows go through the model (`RowModel`)."""
        return self.gradients.rows

    @property
    def row_tokens(self) -> int:
        """The most tokens of a row."""
        return self.gradients.row_tokens

    def _check_invocation(self, setup: Setup, invocation: list[int]) -> None:
        """An activated adapter learns nothing from an example without its invocation: say how many there are."""
        ids = (torch.from_numpy(e.input_ids.astype("int64")) for e in setup.train)
        without = sum(not bool(acting_tokens(row[None], invocation).any()) for row in ids)
        text = self.tokenizer.decode(invocation)
        if without == len(setup.train):
            raise DataError(f"no training example holds the invocation {text!r}, so the adapter would never act")
        if without:
            self._note(f"warning: {without:,} training examples do not hold the invocation {text!r}: nothing is learnt")

    def _restore(self) -> Progress:
        for path in reversed(checkpoints(self.out)):
            try:
                state = load_checkpoint(path, self.trained)
            except RunError as error:
                self._note(f"warning: {error}; trying the one before")
                continue
            self._note(f"resuming after step {state.step}")
            return state
        self._note("no sound checkpoint yet: starting from step 0")
        return Progress()

    def _write_start(self, setup: Setup) -> None:
        record = setup.provenance(self.config) | {
            "adapter": {
                "trainable_parameters": self.report.trainable_parameters,
                "total_parameters": self.report.total_parameters,
                "share": self.report.share,
                "bytes": self.report.bytes,
                "targets": list(self.report.targets),
            }
        }
        write_text(self.out / "provenance.json", json.dumps(record, indent=2) + "\n")
        write_text(self.out / "config.yaml", self.config.to_yaml())  # the last: what makes the folder a run

    def _steps(self, setup: Setup, state: Progress) -> RunResult:
        options, loss = self.config.train, None
        total = setup.total_steps(options)
        warmup = warmup_steps(options.warmup, total)
        started = time.monotonic() - state.seconds
        self.observe({"type": "start", "step": state.step, "total_steps": total})
        if state.step >= total or state.stopped_early:
            self._note("the run had ended: there is no step left to train")
        while state.step < total and not state.stopped_early and not self._interrupted:
            set_lr(self.optimizer, options.lr * lr_factor(state.step + 1, total, warmup, options.schedule))
            record = self._step(setup, state, total)
            if record is None:
                break
            loss, state.seconds = record["loss"], time.monotonic() - started
            self._after_step(setup, state, total, record)
        return self._finish(setup, state, total, loss)

    def _after_step(self, setup: Setup, state: Progress, total: int, record: dict[str, Any]) -> None:
        """The record, and what is due: the held-out loss, a checkpoint."""
        options = self.config.train
        self._log(record)
        if self._due(options.eval_every or setup.steps_per_epoch(options), state.step, total) and setup.heldout:
            self._evaluate(setup, state)
        if state.step % options.save_every == 0 and state.step < total and not state.stopped_early:
            save_checkpoint(self.out, self.trained, state, options.keep_checkpoints)

    @staticmethod
    def _due(every: int, step: int, total: int) -> bool:
        return step % every == 0 or step == total

    def _step(self, setup: Setup, state: Progress, total: int) -> dict[str, Any] | None:
        """One optimiser step; None if an interrupt came in its midst (nothing has changed then)."""
        began, (indices, examples, seed) = time.monotonic(), self._examples(setup, state)
        found = self.gradients.of(examples, seed)
        if found is None:
            return None
        rows, loss = found
        batch = Batch(indices, examples, rows, sum(len(row.targets) for row in rows), seed, began)
        return self._update(setup, state, batch, loss)

    def _examples(self, setup: Setup, state: Progress) -> tuple[list[int], list[TokenizedExample], int]:
        """The examples of the next step, with their indices, and the seed of its dropout, which follows from the step."""
        indices = setup.batch(state.step, self.config)
        return indices, [setup.train[i] for i in indices], (self.config.seed * 1_000_003 + state.step) % 2**63

    def _update(self, setup: Setup, state: Progress, batch: Batch, loss: float) -> dict[str, Any]:
        """Turn the batch's gradients into an update, and give the step's record. Raises `TrainingDiverged`."""
        options = self.config.train
        self._check_finite(loss, state.step + 1, batch)
        if self.adalora:
            self.adalora.backward()
        norm = float(self.optimizer.norm())
        self._check_finite(norm, state.step + 1, batch)
        if options.max_grad_norm and norm > options.max_grad_norm:
            self.optimizer.scale_(options.max_grad_norm / norm)
        if self.config.adapter.lora_fa and options.lora_fa_correction:
            correct_lora_fa(self.bank, self.name)
        self.optimizer.step()
        if self.adalora:
            self.adalora.step(state.step + 1)
        seconds, tokens = time.monotonic() - batch.began, sum(len(e.input_ids) for e in batch.examples)
        state.step += 1
        state.tokens += tokens
        state.supervised_tokens += batch.supervised
        state.examples += len(batch.examples)
        return {
            "type": "train",
            "step": state.step,
            "epoch": state.examples / len(setup.train),
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "examples": len(batch.examples),
            "tokens": tokens,
            "computed_tokens": sum(len(row.input_ids) for row in batch.rows),
            "supervised_tokens": batch.supervised,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "memory_bytes": _memory(self.optimizer.buffers[0].device),
        }

    def _check_finite(self, value: float, step: int, batch: Batch) -> None:
        if math.isfinite(value):
            return
        record = {
            "step": step,
            "examples": [
                {
                    "index": int(i),
                    "input_ids": e.input_ids.tolist(),
                    "text": self.tokenizer.decode(e.input_ids.tolist()),
                }
                for i, e in zip(batch.indices, batch.examples)
            ],
        }
        write_text(self.out / "bad_batch.json", json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        raise TrainingDiverged(
            f"the loss or gradient became {value} at step {step}; the batch is in {self.out / 'bad_batch.json'}; "
            f"a lower train.lr or more train.warmup usually helps"
        )

    def _evaluate(self, setup: Setup, state: Progress) -> None:
        options = self.config.train
        loss = heldout_loss(self.rows, setup.heldout, self.row_tokens, options.eval_examples)
        if not math.isfinite(loss):
            self._log({"type": "eval", "step": state.step, "loss": loss, "best": False})
            raise TrainingDiverged(unsound(loss, state.step))
        best = state.best_loss is None or loss < state.best_loss
        if best:
            state.best_loss, state.best_step, state.evals_without_gain = loss, state.step, 0
            record = {"training": {"step": state.step, "loss": loss}}
            save_adapter(setup.model, self.out / "best", name=self.name, provenance=record)
        else:
            state.evals_without_gain += 1
        state.stopped_early = bool(options.early_stop) and state.evals_without_gain >= options.early_stop
        self._log({"type": "eval", "step": state.step, "loss": loss, "best": best})

    def _finish(self, setup: Setup, state: Progress, total: int, loss: float | None) -> RunResult:
        if state.step and not checkpoint_path(self.out, state.step).exists():
            save_checkpoint(self.out, self.trained, state, self.config.train.keep_checkpoints)
        stopped = "early" if state.stopped_early else "finished" if state.step >= total else "interrupted"
        adapter = self.out / "adapter"
        if stopped != "interrupted":
            if stopped == "early":
                fill_adapter(setup.model, read_tensors(self.out / "best"), self.out / "best", self.name)
            if self.adalora:
                self._finish_ranks(self.adalora)
            record = {"training": {"step": state.step, "best_step": state.best_step, "best_loss": state.best_loss}}
            save_adapter(setup.model, adapter, name=self.name, provenance=record, tokenizer=setup.tokenizer)
        setup.model.eval()
        result = RunResult(self.out, adapter, state.step, total, loss, state.best_loss, state.seconds, stopped)
        self.observe({"type": "end", **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(result).items()}})
        return result

    def _finish_ranks(self, adalora: AdaLora) -> None:
        ranks = adalora.ranks()
        dropped = adalora.finish()
        kept = [rank for rank in ranks.values() if rank]
        self._note(f"ranks {min(kept)} to {max(kept)} over {len(kept)} modules, {sum(kept)} in all")
        if dropped:
            self._note(f"warning: {len(dropped)} modules kept no rank and are not in the adapter: {', '.join(dropped)}")

    def _log(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        self.observe(record)

    def _note(self, text: str) -> None:
        self.observe({"type": "note", "text": text})


def unsound(loss: float, step: int) -> str:
    """What is said of an adapter whose held-out loss is not finite."""
    return (
        f"the held-out loss became {loss} at step {step}: the last updates have spoilt the adapter; a lower train.lr or "
        f"more train.warmup usually helps"
    )


def train(
    config: TrainConfig | dict | str | Path, *, resume: bool = False, observe: Observer | None = None
) -> RunResult:
    """Train an adapter as a `TrainConfig`, a mapping or a YAML file says, and return how it went."""
    if isinstance(config, (str, Path)):
        config = TrainConfig.load(config)
    elif isinstance(config, dict):
        config = TrainConfig.from_dict(config)
    elif not isinstance(config, TrainConfig):
        raise VeneerError(f"train takes a TrainConfig, a mapping or a YAML file, not {type(config).__name__}")
    return Trainer(config, observe=observe).run(resume=resume)


def _memory(device: torch.device) -> int:
    """Peak bytes: the GPU allocator's, or the process's resident memory now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss

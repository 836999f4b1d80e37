"""A sweep: many adapters on one base, trained together, as many at once as are asked for; and what is searched among them.

A sweep is a directory: `sweep.json` says what is tried and how each trial stands, and every trial has an ordinary run
directory beside it.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from veneer.adapter.attach import BANK, detach, get_bank, planned
from veneer.config import TrainConfig, read_yaml
from veneer.errors import ConfigError, RunError, VeneerError
from veneer.files import LOCK, claimed, new_directory, write_text
from veneer.training.adalora import phases
from veneer.training.loop import Observer
from veneer.training.many import Lane, Pool, lone_reason
from veneer.training.search import better_half, rungs
from veneer.training.setup import Setup, check_unchanged, open_base, with_data
from veneer.training.signals import Interrupt
from veneer.training.state import checkpoints, tidy
from veneer.training.trials import DONE, FILE, OVER, Trial, base_key, finite, last_losses, listed, read_sweep
from veneer.version import __version__


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep runs. `at_once` adapters train together, `tokens` bounds a pass (see `Pool`)."""

    search: str = "grid"
    at_once: int = 8
    tokens: int | None = None
    seed: int = 0


class Sweep:
    """Trains the trials of a sweep; `values` is the configuration that they share.

    `observe` is called with each record of each run, with its trial's name under "run", and with notes.
    """

    def __init__(
        self,
        out: str | Path,
        values: dict[str, Any],
        trials: list[Trial],
        options: SweepOptions | None = None,
        *,
        observe: Observer | None = None,
    ) -> None:
        self.out, self.values, self.trials = Path(out), values, trials
        self.options, self.observe = options or SweepOptions(), observe or (lambda record: None)
        self.at_once, self.cuts = self.options.at_once, 0
        self.configs = {trial.name: self._config(trial) for trial in trials}
        self._data: dict[str, Setup] = {}
        self._check()

    def _config(self, trial: Trial) -> TrainConfig:
        with _named(trial):
            if "out" in trial.settings:
                raise ConfigError("out is the same for all: each run has its own folder there")
            config = TrainConfig.from_dict(self.values | {"out": str(self.out / trial.name)}, trial.settings)
            if config.train.vram is not None:
                raise ConfigError("train.vram plans a single run: bound a sweep by --at-once and --tokens instead")
            return config

    def _check(self) -> None:
        if not self.trials:
            raise ConfigError("there is nothing to train: the sweep has no trial")
        if len(self.configs) < len(self.trials):
            raise ConfigError("two adapters have the same name: give each its own")
        if self.options.search == "halving":
            for name, config in self.configs.items():
                if config.data.heldout is None and not config.data.heldout_fraction:
                    raise ConfigError(
                        f"{name}: halving compares held-out losses: set data.heldout or data.heldout_fraction"
                    )

    @classmethod
    def load(
        cls,
        out: str | Path,
        *,
        at_once: int | None = None,
        tokens: int | None = None,
        observe: Observer | None = None,
    ) -> Sweep:
        """A sweep that was started, as its directory has it; `at_once` and `tokens`, if given, are from now on. Raises
        `RunError`."""
        record = read_sweep(out)
        try:
            trials = [Trial(**trial) for trial in record["trials"]]
            options = SweepOptions(**record["options"])
            options = replace(options, at_once=at_once or options.at_once, tokens=tokens or options.tokens)
            sweep = cls(out, record["config"], trials, options, observe=observe)
            sweep.cuts = record["cuts"]
            return sweep
        except (KeyError, TypeError) as error:
            raise RunError(f"{Path(out) / FILE} is damaged: {error}") from None

    def adopt(self, values: dict[str, Any], trials: list[Trial]) -> None:
        """Go on with these settings, as a list of adapters has them now. `RunError` where they change what is trained."""
        now = Sweep(self.out, values, trials, self.options)
        if now.configs.keys() != self.configs.keys():
            raise RunError(f"{self.out} was started with other adapters: {', '.join(self.configs)}; start anew")
        for name, config in now.configs.items():
            check_unchanged(self.out / name, self.configs[name], config)
        for trial in self.trials:
            trial.settings = next(one.settings for one in trials if one.name == trial.name)
        for trial in self._left_to_train:
            trial.alone = ""  # the reason may be gone, such as another train.stream
        self.values, self.configs = values, now.configs

    def run(self, *, resume: bool = False) -> Sweep:
        """Train all trials, or with `resume` what is left of them. Raises what `Trainer` does, but for divergence."""
        if not resume:
            self._check_out()
        with claimed(self.out):
            tidy(self.out)
            self.write()
            if len(self._groups(self._left_to_train)) > 1:
                self._check_groups()
            self._stages()
            self.write()
        return self

    def dry_run(self) -> None:
        """Check everything that `run` checks before it trains, and write nothing."""
        self._check_out()
        self._check_groups()

    def _check_out(self) -> None:
        fresh = (
            not self.out.exists()
            or self.out.is_dir()
            and all(p.name in (FILE, LOCK) or p.suffix == ".tmp" for p in self.out.iterdir())
        )
        if not fresh:
            held = (self.out / FILE).exists()
            what = "already holds a sweep: continue it with --resume, or" if held else "exists and is not empty:"
            raise RunError(f"{self.out} {what} choose another --out")

    def _check_groups(self) -> None:
        """Find out before anything trains which base cannot be opened, which data cannot be read."""
        for group in self._groups(self._left_to_train):
            self._open(group, lambda text: None)
            self._data.clear()

    def _stages(self) -> None:
        with Interrupt() as self.interrupt:
            stages = [*(rungs(len(self.trials)) if self.options.search == "halving" else []), 1.0]
            for number, share in enumerate(stages):
                self._train([trial for trial in self._left_to_train if len(trial.rungs) <= number], share)
                if self.interrupt:
                    break
                if share < 1 and number == self.cuts:
                    self._cut(share)

    @property
    def interrupted(self) -> bool:
        """Whether trials are left to train."""
        return bool(self._left_to_train)

    @property
    def _left_to_train(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status not in OVER]

    @property
    def best(self) -> Trial | None:
        """The trial with the lowest loss among those that were not stopped."""
        scored = [t for t in self.trials if t.status in DONE and t.score is not None]
        return min(scored, key=lambda t: t.rank, default=None)

    def write(self) -> None:
        """Bring sweep.json up to date."""
        best = self.best
        record = {
            "format": 1,
            "veneer": __version__,
            "options": asdict(self.options),
            "config": self.values,
            "cuts": self.cuts,
            "best": best.name if best else None,
            "trials": [asdict(trial) for trial in self.trials],
        }
        write_text(self.out / FILE, json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n")

    def _groups(self, trials: Iterable[Trial]) -> list[list[Trial]]:
        """The trials by the base that they need."""
        groups: dict[str, list[Trial]] = {}
        for trial in trials:
            groups.setdefault(base_key(self.configs[trial.name]), []).append(trial)
        return list(groups.values())

    def _train(self, trials: list[Trial], share: float) -> None:
        """Train some trials until this share of their steps, those on one base together."""
        groups = self._groups(trials)
        if len(groups) > 1:
            sizes = ", ".join(str(len(group)) for group in groups)
            self._note(f"{len(groups)} groups differ in base, precision or speed settings and train apart: {sizes}")
        for group in groups:
            if self.interrupt:
                return
            self._train_group(group, share)

    def _train_group(self, group: list[Trial], share: float) -> None:
        model, tokenizer = self._open(group, self._note)
        for batch in self._apart(group, next(model.parameters()).device):
            self._pool(batch, model, tokenizer, share)
        if BANK in model.__dict__:
            detach(model)
        self._data.clear()  # it holds the base

    def _open(self, group: list[Trial], note: Callable[[str], None]) -> tuple[torch.nn.Module, Any]:
        """The group's base, with all its data read and each adapter checked: nothing trains if one of them cannot."""
        gc.collect()  # the base before is part of cycles, and there may be no room for two
        model, tokenizer = open_base(self.configs[group[0].name], note)
        for trial in group:
            with _named(trial):
                self._check_trial(self.configs[trial.name], model, tokenizer, note)
        return model, tokenizer

    def _check_trial(self, config: TrainConfig, model: torch.nn.Module, tokenizer: Any, note: Callable) -> None:
        adapter = config.adapter.model_copy(update={"adalora": None})
        if not adapter.new_tokens and not isinstance(adapter.invocation, str):
            planned(model, adapter)
        total = self._setup(config, model, tokenizer, note).total_steps(config.train)
        if config.adapter.adalora is not None:
            phases(config.adapter.adalora, total)

    def _setup(self, config: TrainConfig, model: torch.nn.Module, tokenizer: Any, note: Callable) -> Setup:
        """The base with a trial's data, which those that have the same share."""
        key = json.dumps([config.data.model_dump(), config.data.heldout_fraction and config.seed], default=str)
        if key not in self._data:
            self._data[key] = with_data(config, model, tokenizer, note)
        return self._data[key]

    def _apart(self, trials: list[Trial], device: torch.device) -> Iterable[list[Trial]]:
        """Those that train together, and then the others one by one, among them those that turn out to have to."""
        for trial in trials:
            trial.alone = trial.alone or lone_reason(self.configs[trial.name], device) or ""
        if shared := [trial for trial in trials if not trial.alone]:
            yield shared
        for trial in [trial for trial in trials if trial.alone and not self.interrupt]:
            self._note(f"{trial.name} trains by itself: {trial.alone}")
            yield [trial]

    def _pool(self, trials: list[Trial], model: torch.nn.Module, tokenizer: Any, share: float) -> None:
        waiting = deque(trials)
        with Pool(model, tokens=self.options.tokens, note=self._note) as pool:
            while (waiting or pool.lanes) and not self.interrupt:
                while waiting and len(pool.lanes) < self.at_once:
                    self._enter(pool, waiting, model, tokenizer, share)
                if not pool.lanes:
                    continue
                for lane in pool.tick():
                    self._left(lane)
            for lane in pool.lanes:
                lane.leave("paused")
                self._left(lane)
        self.write()

    def _enter(self, pool: Pool, waiting: deque[Trial], model: Any, tokenizer: Any, share: float) -> None:
        """Put the next trial into the pool, where memory allows."""
        trial = waiting.popleft()
        lane = self._lane(trial, {lane.name for lane in pool.lanes}, model, tokenizer)
        total = lane.setup.total_steps(lane.config.train)
        lane.until = max(1, math.ceil(total * share)) if share < 1 else None
        try:
            reason = pool.add(lane, resume=started(lane.out))
        except torch.OutOfMemoryError:
            if not pool.lanes:
                raise
            if lane.name in get_bank(model).entries:
                get_bank(model).remove(lane.name)
            torch.cuda.empty_cache()
            waiting.appendleft(trial)
            self.at_once = len(pool.lanes)
            self._note(f"warning: no more than {self.at_once} adapters fit into memory at once")
            return
        trial.total_steps = total
        if reason is not None:
            trial.alone = reason

    def _lane(self, trial: Trial, taken: set[str], model: torch.nn.Module, tokenizer: Any) -> Lane:
        config = self.configs[trial.name]
        setup = replace(self._setup(config, model, tokenizer, self._note))

        def observe(record: dict[str, Any]) -> None:
            self.observe(record | {"run": trial.name})

        # The first free name, so that blocks which were compiled for an adapter of these ranks serve the next one too.
        name = next(name for name in (f"lane{i}" for i in count()) if name not in taken)
        return Lane(config, name, setup, observe, alone=bool(trial.alone))

    def _left(self, lane: Lane) -> None:
        """Note how a trial stands now that it has left the pool."""
        trial = next(trial for trial in self.trials if self.configs[trial.name].out == lane.config.out)
        trial.step, trial.seconds, trial.reason = lane.state.step, lane.state.seconds, lane.reason
        trial.loss, heldout = last_losses(lane.out)
        trial.heldout = lane.state.best_loss if lane.status == "early" else heldout
        trial.status = lane.status if lane.status in OVER else "waiting"
        if lane.rung_loss is not None:
            trial.heldout = lane.rung_loss
            trial.rungs.append(lane.rung_loss)
        if trial.status == "diverged":
            self._note(f"warning: {trial.name} diverged and left: {trial.reason}")
        self.write()

    def _cut(self, share: float) -> None:
        """Stop the worse half of the trials that are still in the race."""
        racing = [t for t in self.trials if t.status not in ("stopped", "diverged")]
        of = math.ceil(len(self.trials) / 2**self.cuts)  # whoever left by itself before has no second place to lose
        going = set(better_half({t.name: t.score for t in racing}, of))
        for trial in racing:
            if trial.name not in going and trial.status not in OVER:
                trial.status = "stopped"
                trial.reason = f"in the worse half by held-out loss at {share:.3g} of its steps"
                keep_adapter(self.out / trial.name)
        self.cuts += 1
        self._note(f"at {share:.3g} of the steps: {len(going)} of {len(racing)} go on")
        self.write()

    def _note(self, text: str) -> None:
        self.observe({"type": "note", "text": text})


@contextmanager
def _named(trial: Trial) -> Iterator[None]:
    """A user's mistake in a `with` block says whose it is."""
    try:
        yield
    except VeneerError as error:
        error.args = (f"{trial.name}: {error}",)  # some are made of more than a text
        raise


def started(run: Path) -> bool:
    """Whether a run can be resumed; one that was killed before it had written its start is cleared away."""
    if (run / "config.yaml").exists():
        return True
    shutil.rmtree(run, ignore_errors=True)
    return False


def keep_adapter(run: Path) -> None:
    """Give a run that was stopped on its way the adapter of its newest checkpoint."""
    if (found := checkpoints(run)) and not (run / "adapter").exists():
        with new_directory(run / "adapter") as folder:
            shutil.copytree(found[-1] / "adapter", folder, dirs_exist_ok=True)


def train_many(
    config: dict[str, Any] | str | Path,
    *,
    at_once: int | None = None,
    tokens: int | None = None,
    resume: bool = False,
    observe: Observer | None = None,
) -> Sweep:
    """Train the `adapters` that a configuration (a mapping or a YAML file) lists, together on one base.

    `at_once` (8) train together and `tokens` bounds a pass, as in `Sweep`. Each has its run directory in the configuration's
    `out`; how they ended is in the result's `trials`.
    """
    values = dict(config) if isinstance(config, dict) else read_yaml(config)
    shared, trials = listed(values)
    if not shared.get("out"):
        raise ConfigError("configuration key 'out' is required: the folder of the adapters' runs")
    out = Path(shared["out"])
    if resume:
        sweep = Sweep.load(out, at_once=at_once, tokens=tokens, observe=observe)
        sweep.adopt(shared, trials)
        return sweep.run(resume=True)
    options = SweepOptions("list", at_once or SweepOptions.at_once, tokens)
    return Sweep(out, shared, trials, options, observe=observe).run()

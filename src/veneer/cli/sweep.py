"""veneer sweep, and veneer train of a list of adapters"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from veneer.cli.common import Display, err
from veneer.errors import ConfigError, RunError

SEARCHES = ("grid", "random", "halving")
SHOWN = 20


def command(
    config: Annotated[Path, typer.Argument(help="A YAML configuration, or a sweep's directory with --resume.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUES",
            help="Values to try: adapter.rank=4,16 or, drawn at random, train.lr=1e-5..1e-3; one value is set for all.",
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(help="grid (all combinations), random, or halving (the worse half stops at each rung)."),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Draw so many combinations at random.")] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Adapters that train together, 8 by default; the others wait their turn.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=16, help="Most tokens in one pass of all adapters. Default: train.micro_batch_tokens."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the draws, 0 by default.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="The folder to make for the sweep and its runs.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a sweep was stopped.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the trials, train nothing.")] = False,
) -> None:
    """Train many adapters together on one base, with different settings, and compare them."""
    if resume:
        if settings or search or trials or seed is not None or dry_run:
            raise ConfigError(
                "--resume goes on with the sweep as it was started: leave --set, --search, --trials, --seed and "
                "--dry-run out"
            )
        resume_sweep(Path(out) if out else _out_of(config), at_once=at_once, tokens=tokens)
        return
    if config.is_dir():
        raise ConfigError(f"{config} is a directory: to go on with a sweep add --resume, else name a YAML file")
    values, found = _trials(config, settings or [], search or "grid", trials, seed or 0, out)
    from veneer.training.sweep import Sweep, SweepOptions

    options = SweepOptions(search or "grid", at_once or SweepOptions.at_once, tokens, seed or SweepOptions.seed)
    display = SweepDisplay()
    sweep = Sweep(values["out"], values, found, options, observe=display)
    _dry_run(sweep) if dry_run else run(sweep, display)


def _dry_run(sweep: Any) -> None:
    sweep.dry_run()
    for trial in sweep.trials:
        print(trial.name)
    count = len(sweep.trials)
    err.print(f"{count} adapters, {min(sweep.at_once, count)} at once; all is valid, nothing was trained")


def resume_sweep(out: Path, listed: tuple | None = None, **options: int | None) -> None:
    """Go on with a sweep, whose shared configuration and trials are `listed` now (absent: as they were)."""
    from veneer.training.sweep import Sweep

    display = SweepDisplay()
    sweep = Sweep.load(out, observe=display, **options)
    if listed is not None:
        sweep.adopt(*listed)
    run(sweep, display, resume=True)


def train_list(values: dict[str, Any], *, resume: bool, dry_run: bool) -> None:
    """`veneer train` of a configuration that lists adapters."""
    from veneer.training.sweep import Sweep, SweepOptions
    from veneer.training.trials import listed

    shared, trials = listed(values)
    _check_out(shared)
    if resume and dry_run:
        raise ConfigError("--resume goes on with the sweep as it was started: leave --dry-run out")
    if resume:
        resume_sweep(Path(shared["out"]), (shared, trials))
        return
    display = SweepDisplay()
    sweep = Sweep(shared["out"], shared, trials, SweepOptions("list"), observe=display)
    _dry_run(sweep) if dry_run else run(sweep, display)


def _out_of(config: Path) -> Path:
    """A sweep's directory: the path itself, or what a configuration names as `out`."""
    from veneer.config import read_yaml

    if config.is_dir() or not config.exists():
        return config
    values = read_yaml(config)
    _check_out(values)
    return Path(values["out"])


def is_sweep(path: Path) -> bool:
    """Whether a directory holds a sweep."""
    return (path / "sweep.json").exists()


def run(sweep: Any, display: Display, *, resume: bool = False) -> None:
    """Train, write the pages, print the table."""
    with display:
        sweep.run(resume=resume)
    if sweep.interrupted:
        err.print(f"stopped; go on: veneer sweep {sweep.out} --resume")
        raise typer.Exit(130)
    from veneer.report.page import write_report
    from veneer.report.sweep import write_sweep_report
    from veneer.training.trials import DONE

    for trial in sweep.trials:
        if (sweep.out / trial.name / "config.yaml").exists():
            write_report(sweep.out / trial.name)
    page = write_sweep_report(sweep.out)
    console = Console(highlight=False)
    console.print(table(sweep.trials, sweep.best))
    console.print(f"report   {page}", soft_wrap=True)
    if sweep.best:
        best = sweep.out / sweep.best.name
        console.print(
            f"best     {best}\nnext     veneer eval {best}   ·   veneer chat {best} --compare", soft_wrap=True
        )
    if not any(trial.status in DONE for trial in sweep.trials):
        raise RunError("no trial reached its end: all diverged; lower learning rates usually help")


def table(trials: list[Any], best: Any) -> Table:
    """The trials, best first, as many as one screen holds."""
    keys = [key for key in dict.fromkeys(k for t in trials for k in t.settings)]
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("")
    grid.add_column("run", overflow="fold")
    for key in keys[:4]:
        grid.add_column(key.rpartition(".")[2], justify="right")
    for name in ("held-out", "loss", "steps", ""):
        grid.add_column(name, justify="right" if name else "left")
    order = sorted(trials, key=lambda t: t.rank)
    for trial in order[:SHOWN]:
        own = [_value(trial.settings.get(key)) for key in keys[:4]]
        numbers = [_loss(trial.heldout), _loss(trial.loss), f"{trial.step}/{trial.total_steps or '–'}"]
        grid.add_row("★" if trial is best else "", trial.name, *own, *numbers, trial.status)
    if len(order) > SHOWN:
        grid.add_row("", f"… and {len(order) - SHOWN} more")
    return grid


def _value(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _check_out(values: dict[str, Any]) -> None:
    if not values.get("out"):
        raise ConfigError("say where the runs go: --out, or the key out in the configuration")


def _trials(config: Path, settings: list[str], search: str, trials: int | None, seed: int, out: str | None):
    """The shared configuration and the trials: the listed adapters, if there are, times what is searched."""
    from veneer.config import put, read_yaml
    from veneer.training.search import Range, grid, parse_space, sample
    from veneer.training.trials import Trial, listed, named_trials

    if search not in SEARCHES:
        raise ConfigError(f"--search is one of {', '.join(SEARCHES)}, not {search!r}")
    values = read_yaml(config) | ({"out": out} if out else {})
    fixed, space = parse_space(settings)
    for key, value in fixed.items():
        put(values, key, value)
    _check_out(values)
    drawn = search == "random" or any(isinstance(choice, Range) for choice in space.values())
    if drawn and trials is None and search != "grid":
        raise ConfigError("say how many combinations to draw: --trials N")
    if trials is not None and search == "grid":
        raise ConfigError("a grid tries every combination: --trials goes with --search random or halving")
    points = grid(space) if trials is None else sample(space, trials, seed)
    if space and trials is not None and len(points) < trials:
        err.print(f"there are no more than {len(points)} combinations to draw")
    if "adapters" not in values:
        if not space:
            raise ConfigError(
                "there is nothing to vary: --set adapter.rank=4,16 or a list of adapters in the YAML file"
            )
        return values, named_trials(points)
    shared, every = listed(values)
    if not space:
        return shared, every
    return shared, [
        Trial(f"{one.name}-{point.name}", one.settings | point.settings)
        for one in every
        for point in named_trials(points)
    ]


class SweepDisplay(Display):
    """Progress of all trials: one bar in a terminal, else a line every ten seconds; warnings as they come."""

    def __init__(self) -> None:
        super().__init__("steps · {task.fields[running]} at once · {task.fields[speed]} tok/s")
        self.steps: dict[str, int] = {}
        self.totals: dict[str, int] = {}
        self.running: dict[str, float] = {}

    def __enter__(self) -> SweepDisplay:
        self.task = self.progress.add_task("", total=None, running=0, speed="–")
        super().__enter__()
        return self

    def _note(self, record: dict[str, Any]) -> None:
        text, run = record["text"], record.get("run")
        if run is None or text.startswith("warning"):
            self.say(f"{run}: {text}" if run else text, warning=text.startswith("warning"))

    def _start(self, record: dict[str, Any]) -> None:
        self.steps[record["run"]], self.totals[record["run"]] = record["step"], record["total_steps"]

    def _train(self, record: dict[str, Any]) -> None:
        run = record["run"]
        self.steps[run], self.running[run] = record["step"], record["tokens_per_second"]
        done, total = sum(self.steps.values()), sum(self.totals.values())
        speed = f"{sum(self.running.values()):,.0f}"
        if err.is_terminal:
            self.progress.update(self.task, completed=done, total=total, running=len(self.running), speed=speed)
        elif time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            err.print(f"step {done}/{total} of {len(self.steps)} runs  {len(self.running)} at once  {speed} tok/s")

    def _leave(self, record: dict[str, Any]) -> None:
        self.running.pop(record["run"], None)
        if record["status"] != "paused":  # no more steps will come
            self.totals[record["run"]] = record["step"]

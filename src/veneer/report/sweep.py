"""A sweep's result page: its trials side by side, their losses, and the best settings."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from matplotlib.axes import Axes

from veneer.errors import RunError
from veneer.files import write_text
from veneer.report import plots
from veneer.report.page import environment
from veneer.report.run import is_number, mapping
from veneer.training.metrics import read_metrics
from veneer.training.trials import rank, read_sweep, score
from veneer.version import __version__

CURVES = 40
"""So many runs at most are drawn; the best ones."""
TICKS, LABEL = 8, 28


def write_sweep_report(out: str | Path) -> Path:
    """Write out/report.html from what a sweep holds so far, and return its path."""
    out = Path(out)
    write_text(out / "report.html", render(out, read_sweep(out)))
    return out / "report.html"


def render(out: Path, record: dict[str, Any]) -> str:
    """The page as HTML; every value from the sweep is escaped."""
    trials = ranked([mapping(trial) for trial in record["trials"]])
    problems, metrics = [], {}
    for trial in trials[:CURVES]:
        try:
            metrics[trial.get("name")] = read_metrics(out / str(trial.get("name")))
        except RunError as error:
            problems.append(str(error))
    best = next((trial for trial in trials if trial.get("name") == record.get("best")), None)
    keys = list(dict.fromkeys(key for trial in trials for key in mapping(trial.get("settings"))))
    images = {
        "Held-out loss": heldout_plot(trials, metrics, best),
        "Training loss, smoothed": train_plot(trials, metrics, best),
        **{f"Loss by {key}": scatter(trials, key, best) for key in keys},
    }
    return (
        environment()
        .get_template("sweep.html")
        .render(
            name=out.resolve().name,
            facts=facts(record, trials),
            problems=problems,
            trials=trials,
            best=best,
            keys=keys,
            curves={title: Markup(image) for title, image in images.items() if image},
            best_yaml=best_settings(best) if best else "",
            commands=commands(out, best),
            config_yaml=yaml.safe_dump(record.get("config"), sort_keys=False, allow_unicode=True),
            version=record.get("veneer") or __version__,
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def standing(trial: dict[str, Any]) -> tuple[str | None, float | None, float | None]:
    """How a trial stands, its held-out and its training loss: what it is compared by."""
    heldout, loss = (trial[key] if is_number(trial.get(key)) else None for key in ("heldout", "loss"))
    return trial.get("status"), heldout, loss


def ranked(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best first."""
    return sorted(trials, key=lambda trial: rank(*standing(trial)))


def facts(record: dict[str, Any], trials: Sequence[dict[str, Any]]) -> list[str]:
    """What stands under the title."""
    options, counts = mapping(record.get("options")), {}
    for trial in trials:
        counts[trial.get("status")] = counts.get(trial.get("status"), 0) + 1
    done = [f"{len(trials)} adapters on {mapping(record.get('config')).get('model') or 'the default base'}"]
    done.append(f"{options.get('search', 'grid')}, {options.get('at_once', 1)} at once")
    return done + [f"{count} {status}" for status, count in counts.items()]


def best_settings(best: dict[str, Any]) -> str:
    """The best trial's own settings as a configuration has them."""
    values: dict[str, Any] = {}
    for key, value in mapping(best.get("settings")).items():
        inner, (*parents, leaf) = values, key.split(".")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def commands(out: Path, best: dict[str, Any] | None) -> dict[str, str]:
    """Shell commands for the best run."""
    path = str(out / str(best["name"])) if best else None
    return {what: shlex.join(["veneer", what, path]) for what in ("eval", "chat")} if path else {}


def heldout_plot(trials: Sequence[dict], metrics: dict[Any, list[dict]], best: dict | None) -> str | None:
    """Held-out losses by step, those at rungs too."""
    points = {
        name: sorted(plots.series(records, "eval", "loss") + plots.series(records, "rung", "loss"))
        for name, records in metrics.items()
    }
    return _lines("Held-out loss of each run", trials, points, best, marker="o")


def train_plot(trials: Sequence[dict], metrics: dict[Any, list[dict]], best: dict | None) -> str | None:
    """Smoothed training losses by step."""
    points = {name: plots.smooth(plots.series(records, "train", "loss")) for name, records in metrics.items()}
    return _lines("Training loss of each run", trials, points, best)


def _lines(title: str, trials: Sequence[dict], points: dict[Any, plots.Points], best: dict | None, marker: str = ""):
    if not any(points.values()):
        return None

    def draw(axes: Axes) -> None:
        for trial in reversed(trials):  # the best on top
            mine = points.get(trial.get("name"))
            if mine:
                steps, values = zip(*plots.decimate(mine))
                top = trial is best
                axes.plot(
                    steps, values, color=plots.ORANGE if top else plots.BLUE, alpha=1.0 if top else 0.35,
                    linewidth=2.0 if top else 1.0, marker=marker, markersize=4, label="best" if top else None,
                )  # fmt: skip
        if best is not None and points.get(best.get("name")):
            axes.legend(frameon=False, labelcolor=plots.NEUTRAL, loc="upper right")

    return plots.svg(title, plots.STEP, "loss (nats per token)", draw, size=(6.6, 4.7))


def scatter(trials: Sequence[dict], key: str, best: dict | None) -> str | None:
    """Each trial's loss by its value of one setting; None where fewer than two values were tried."""
    found = [(mapping(t.get("settings")).get(key), score(*standing(t)), t) for t in trials]
    found = [(value, loss, t) for value, loss, t in found if value is not None and loss is not None]
    numeric = all(is_number(value) for value, _, _ in found)
    labels = list(dict.fromkeys(str(value) for value, _, _ in sorted(found, key=lambda f: str(f[0]))))
    if len(labels) < 2:
        return None

    def draw(axes: Axes) -> None:
        for stopped in (True, False):
            mine = [f for f in found if (f[2].get("status") == "stopped") == stopped]
            x = [value if numeric else labels.index(str(value)) for value, _, _ in mine]
            label = "stopped early" if stopped else "to the end"
            style = {"marker": "x" if stopped else "o", "linestyle": "", "color": plots.BLUE}
            if mine:
                axes.plot(x, [loss for _, loss, _ in mine], label=label, **style)
        for value, loss, trial in found:
            if trial is best:
                x = value if numeric else labels.index(str(value))
                axes.plot([x], [loss], "o", color=plots.ORANGE, markersize=9, label="best")
        if numeric:
            values = sorted({value for value, _, _ in found})
            if values[0] > 0 and values[-1] / values[0] >= 8:
                axes.set_xscale("log")
            if len(values) <= TICKS:  # the values themselves, not round numbers between them
                axes.set_xticks(values, [f"{value:g}" for value in values])
                axes.minorticks_off()
        else:
            _ticks(axes, labels)
        axes.legend(frameon=False, labelcolor=plots.NEUTRAL, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)

    return plots.svg(f"Loss by {key}", key, "loss", draw, size=(6.6, 4.0), whole_steps=False)


def _ticks(axes: Axes, labels: Sequence[str]) -> None:
    """Texts under the horizontal axis as they are (matplotlib would take $…$ for a formula), long ones by their end."""
    short = [text if len(text) <= LABEL else f"…{text[1 - LABEL :]}" for text in labels]
    slant = {"rotation": 20, "ha": "right"} if sum(map(len, short)) > 60 else {}
    axes.set_xticks(range(len(labels)), short, parse_math=False, **slant)

"""Curves of a run as inline SVG: text as text, no background, neutral parts in the page's own text colour."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from html import escape
from itertools import accumulate
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from veneer.report.run import is_number

MAX_POINTS = 2000
NEUTRAL = "#010203"  # stands for currentColor, which matplotlib does not know
BLUE, ORANGE = "#3f7fd0", "#d9822b"  # both readable on white and on near-black
STEP = "optimiser step"
Points = list[tuple[int, float]]


def loss_plot(records: Sequence[dict[str, Any]]) -> str | None:
    """Training loss (light, and smoothed) and held-out loss (marked) by step; None without any loss."""
    train, heldout = series(records, "train", "loss"), series(records, "eval", "loss")
    if not train and not heldout:
        return None

    def draw(axes: Axes) -> None:
        if train:
            marker = "o" if len(train) <= 60 else None
            axes.plot(*_columns(train), color=BLUE, alpha=0.35, linewidth=0.8, marker=marker, markersize=2)
            axes.plot(*_columns(smooth(train)), color=BLUE, linewidth=1.8, label="training, smoothed")
        if heldout:
            axes.plot(*_columns(heldout), color=ORANGE, linewidth=1.2, marker="o", markersize=5, label="held-out")
            step, value = min(heldout, key=lambda point: point[1])
            axes.plot([step], [value], "o", color=ORANGE, markersize=9, fillstyle="none", label=f"best: {value:.3g}")
        axes.legend(frameon=False, labelcolor=NEUTRAL, loc="upper right")

    return svg("Loss by optimiser step", STEP, "loss (nats per token)", draw, size=(6.6, 4.7))


def lr_plot(records: Sequence[dict[str, Any]]) -> str | None:
    """Learning rate by step; None where the records hold none."""
    points = series(records, "train", "lr")
    if not points:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*_columns(points), color=BLUE, linewidth=1.8)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
        axes.set_ylim(bottom=0)

    return svg("Learning rate by optimiser step", STEP, "learning rate", draw)


def speed_plot(records: Sequence[dict[str, Any]]) -> str | None:
    """Tokens per second by step, with the median; None where the records hold none."""
    points = series(records, "train", "tokens_per_second")
    if not points:
        return None
    median = statistics.median(value for _, value in points)

    def draw(axes: Axes) -> None:
        axes.plot(*_columns(points), color=BLUE, linewidth=1.0, alpha=0.7)
        axes.axhline(median, color=NEUTRAL, linewidth=1, linestyle="--", label=f"median {median:,.0f}")
        axes.legend(frameon=False, labelcolor=NEUTRAL, loc="lower right")
        axes.set_ylim(bottom=0)

    return svg("Speed by optimiser step", STEP, "tokens per second", draw)


def series(records: Sequence[dict[str, Any]], kind: str, key: str) -> Points:
    """(step, value) of the records of one type that hold a number under `key`."""
    return [
        (record["step"], float(record[key]))
        for record in records
        if record.get("type") == kind and is_number(record.get("step")) and is_number(record.get(key))
    ]


def smooth(points: Points) -> Points:
    """Mean over the neighbours, a fifteenth of the points in all; fewer on both sides at the start, on one at the end.

    Centred, so that it does not lag behind a falling loss as an exponential average does.
    """
    half = max(len(points) // 30, 1)
    sums = [0.0, *accumulate(value for _, value in points)]
    done = []
    for i, (step, _) in enumerate(points):
        first, last = i - min(i, half), min(i + min(i, half), len(points) - 1)
        done.append((step, (sums[last + 1] - sums[first]) / (last + 1 - first)))
    return done


def decimate(points: Points, most: int = MAX_POINTS) -> Points:
    """At most `most` points, evenly spread, with the first and the last."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _columns(points: Points) -> tuple[list[int], list[float]]:
    kept = decimate(points)
    return [step for step, _ in kept], [value for _, value in kept]


def svg(
    title: str,
    x_label: str,
    y_label: str,
    draw: Callable[[Axes], None],
    size: tuple[float, float] = (5.0, 2.3),
    whole_steps: bool = True,
) -> str:
    """One pair of axes that `draw` fills, as inline SVG; the horizontal one counts, unless `whole_steps` is off."""
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 12}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(x_label, color=NEUTRAL)
        axes.set_ylabel(y_label, color=NEUTRAL)
        if whole_steps:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.tick_params(which="both", colors=NEUTRAL)
        axes.yaxis.get_offset_text().set_color(NEUTRAL)
        axes.grid(color=NEUTRAL, alpha=0.12, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=NEUTRAL, alpha=0.4)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """Cut what an HTML page does not need: prolog, metadata, fixed size, ids that would repeat between plots."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r"font-family: [^;]*;", "font-family: system-ui, sans-serif;", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)  # not in labels
    box = re.search(r'viewBox="[^"]*"', svg)
    start = (
        f'<svg {box[0] if box else ""} role="img" aria-label="{escape(title)}" '
        f'stroke-linejoin="round" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink"><title>{escape(title)}</title>'
    )
    svg = start + svg[svg.index(">") + 1 :]
    return re.sub(r"\s*\n\s*", "\n", svg.replace(NEUTRAL, "currentColor")).strip()

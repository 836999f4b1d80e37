"""`veneer explain` of an adapter: plots of its spectra, and one self-contained page."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from veneer.adapter.targets import layer_index
from veneer.files import write_text
from veneer.plan.spectrum import ENERGY, AdapterSpectrum, LayerSpectrum
from veneer.report.page import environment
from veneer.report.plots import NEUTRAL, svg
from veneer.version import __version__

COLOURS = ("#3f7fd0", "#d9822b", "#2f9e77", "#b765c4", "#c9514f", "#8a8f2a", "#1f9fb3", "#8c6d5a")
MARKERS = "os^Dv<>P"
PLOT = (6.4, 3.5)


def write_page(spectrum: AdapterSpectrum, file: str | Path) -> Path:
    """Write the page. Raises `RunError` (no such folder, no room)."""
    write_text(file, render(spectrum))
    return Path(file)


def render(spectrum: AdapterSpectrum) -> str:
    """The page as HTML; every name from the adapter is escaped."""
    curves = {
        "Singular values of ΔW, mean over the layers of a kind": spectrum_plot(spectrum),
        "Energy kept by a smaller rank": energy_plot(spectrum),
        "How much each layer changed": change_plot(spectrum),
        "Effective rank": rank_plot(spectrum),
    }
    return (
        environment()
        .get_template("spectra.html")
        .render(
            spectrum=spectrum,
            name=_title(Path(spectrum.path).resolve()),
            summary=spectrum.summary(),
            layers=spectrum.changed_most(),
            curves={caption: Markup(image) for caption, image in curves.items()},
            energy=ENERGY,
            version=__version__,
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def _title(path: Path) -> str:
    """The run's name, where the adapter is a run's."""
    run = next((p for p in path.parents if (p / "config.yaml").exists()), None)
    return run.name if run else path.name


def by_ending(spectrum: AdapterSpectrum) -> dict[str, list[LayerSpectrum]]:
    """The layers by the last part of their names."""
    groups: dict[str, list[LayerSpectrum]] = {}
    for layer in spectrum.layers:
        groups.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    return groups


def spectrum_plot(spectrum: AdapterSpectrum) -> str:
    """σ_i by i on a logarithmic axis: one line a kind of layer, the mean over its layers."""

    def draw(axes: Axes) -> None:
        for (name, layers), style in zip(by_ending(spectrum).items(), _styles()):
            longest = max(len(layer.singular_values) for layer in layers)
            columns = [[v[i] for v in (la.singular_values for la in layers) if i < len(v)] for i in range(longest)]
            means = [sum(column) / len(column) for column in columns]
            shown = [(i + 1, mean) for i, mean in enumerate(means) if mean > 1e-12 * max(means)]
            axes.plot(*zip(*shown) if shown else ([], []), label=name, **style)
        if spectrum.norm:
            axes.set_yscale("log")
        _legend(axes)

    return svg("Singular values of ΔW by kind of layer", "i", "σᵢ of ΔW", draw, PLOT)


def energy_plot(spectrum: AdapterSpectrum) -> str:
    """Share of Σ‖ΔW‖² that stays when every layer is cut to rank r′, with the 99 % line."""
    kept, rank = spectrum.energy_kept, spectrum.summary()["rank_99"]

    def draw(axes: Axes) -> None:
        axes.plot(range(1, len(kept) + 1), kept, color=COLOURS[0], linewidth=1.8, marker="o", markersize=3)
        axes.axhline(ENERGY, color=NEUTRAL, linewidth=1, linestyle="--", label=f"{100 * ENERGY:.0f} %: rank {rank}")
        axes.set_ylim(top=1.02)
        axes.legend(frameon=False, labelcolor=NEUTRAL, loc="lower right")

    return svg("Energy kept by rank", "rank r′", "share of ‖ΔW‖²", draw, PLOT)


def change_plot(spectrum: AdapterSpectrum) -> str:
    """‖ΔW‖/‖W‖, or ‖ΔW‖ where W is not at hand, by block: one line a kind of layer."""
    relative = all(layer.weight_norm for layer in spectrum.layers)
    label = "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖"
    return _by_block(spectrum, label, lambda layer: layer.relative_norm if relative else layer.norm)


def rank_plot(spectrum: AdapterSpectrum) -> str:
    """Entropy rank by block: one line a kind of layer."""
    return _by_block(spectrum, "effective rank", lambda layer: layer.effective_rank)


def _by_block(spectrum: AdapterSpectrum, label: str, value: Callable[[LayerSpectrum], float]) -> str:
    def draw(axes: Axes) -> None:
        for (name, layers), style in zip(by_ending(spectrum).items(), _styles()):
            points = sorted((layer_index(layer.name) or 0, value(layer)) for layer in layers)
            axes.plot(*zip(*points), label=name, **style)
        axes.set_ylim(bottom=0)
        if "/" in label:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _legend(axes)

    return svg(f"{label} by block", "block", label, draw, PLOT)


def _styles():
    """Colours and marks, so that lines are told apart without colour too; in turns for ever."""
    place = 0
    while True:
        i = place % len(COLOURS)
        dash = ("-", "--", ":")[place // len(COLOURS) % 3]
        yield {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": dash, "linewidth": 1.4, "markersize": 4}
        place += 1


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, labelcolor=NEUTRAL, fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))

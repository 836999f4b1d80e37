"""What `veneer explain` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from veneer.plan.explain import Explanation
from veneer.plan.spectrum import AdapterSpectrum
from veneer.report.text import NONE, number

MOST_LAYERS = 8
PARTS = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_bias": "biases after B",
    "trainable_tokens": "token rows",
    "modules_to_save": "whole modules",
    "bias": "the base's biases",
}


def print_explanation(found: Explanation, console: Console) -> None:
    """The terminal form of an `Explanation`."""
    part = ", ".join(f"{PARTS[key]} {number(count)}" for key, count in found.trained_by_part.items())
    _facts(
        console,
        [
            ("model", f"{found.model}: {found.architecture}, {number(found.base_parameters)} parameters"),
            (
                "trained",
                f"{number(found.trainable_parameters)} of {number(found.total_parameters)} ({found.share:.2%})",
            ),
            ("of these", part),
            (
                "on disk",
                f"adapter {_bytes(found.adapter_bytes)}, model {_bytes(found.model_bytes)} in {found.dtype}: "
                f"{found.adapter_bytes / found.model_bytes:.2%}",
            ),
        ],
    )
    _targets(found, console)
    _memory(found, console)
    _scalings(found, console)
    rows = [(g.name, g.type, number(g.modules), number(g.parameters), g.reason) for g in found.left_out]
    _table(console, "Left as they are", ("Name", "Type", "Count", "Parameters", "Why"), rows, left=(0, 1, 4))
    _notes(console, found.notes)


def print_spectrum(found: AdapterSpectrum, console: Console) -> None:
    """The terminal form of an `AdapterSpectrum`."""
    s = found.summary()
    relative = f", {s['relative_norm']:.3%} of ‖W‖ ({found.base})" if s["relative_norm"] is not None else ""
    _facts(
        console,
        [
            ("adapter", f"{found.path}: {number(found.trainable_parameters)} numbers, {_bytes(found.adapter_bytes)}"),
            ("‖ΔW‖", f"{number(s['norm'])}{relative}"),
            (
                "rank used",
                f"effective {number(s['mean_effective_rank'])} of {s['rank']} ({s['mean_used']:.0%}), "
                f"stable {number(s['mean_stable_rank'])}; means over {s['layers']} layers",
            ),
            (
                "99 %",
                f"rank {s['rank_99']} would keep 99 % of ‖ΔW‖² over all layers, rank {s['rank_99_each']} in each "
                f"(most: {s['rank_99_each_layer']})",
            ),
        ],
    )
    layers = found.changed_most()
    rows = [
        (
            la.name + (f" ({la.experts} experts)" if la.experts > 1 else ""),
            number(la.norm),
            NONE if la.relative_norm is None else f"{la.relative_norm:.3%}",
            number(la.rank),
            number(la.effective_rank),
            number(la.stable_rank),
            number(la.rank_99),
        )
        for la in layers[:MOST_LAYERS]
    ]
    head = ("Layer", "‖ΔW‖", "‖ΔW‖/‖W‖", "Rank", "Effective", "Stable", "Keeps 99 %")
    more = f", {len(layers) - MOST_LAYERS} more in --json and --page" if len(layers) > MOST_LAYERS else ""
    _table(console, f"Changed most{more}", head, rows, left=(0,))
    _notes(console, found.notes)


def _targets(found: Explanation, console: Console) -> None:
    rows = [
        (
            g["name"],
            number(g["modules"]),
            _shape((g["d_out"], g["d_in"]), g["experts"]),
            _shape(g["lora_A"]),
            _shape(g["lora_B"]),
            number(g["full_parameters"]),
            number(g["lora_parameters"]),
            f"{g['reduction']:.1%}",
        )
        for g in found.groups()
    ]
    if not rows:
        return
    full, low = (sum(getattr(t, key) for t in found.targets) for key in ("full_parameters", "lora_parameters"))
    rows.append(("all", number(len(found.targets)), "", "", "", number(full), number(low), f"{1 - low / full:.1%}"))
    head = ("Target", "Count", "W", "A", "B", "Full", "Low-rank", "Fewer")
    _table(console, "Adapted: each W (d_out × d_in) gets s·B·A", head, rows, left=(0,))


def _memory(found: Explanation, console: Console) -> None:
    ways = {"full": "Full (float32)", "lora": "LoRA", "qlora": "QLoRA (NF4)"}
    values = {way: found.memory[way].as_dict() for way in ways}
    rows = [
        (word, *(_bytes(values[way][key]) for way in ways))
        for key, word in (("weights", "weights"), ("gradients", "gradients"), ("optimizer", "AdamW"), ("total", "all"))
    ]
    _table(console, "Memory in training, without activations", ("", *ways.values()), rows, left=(0,))


def _scalings(found: Explanation, console: Console) -> None:
    rank, alpha, rslora = (found.adapter[key] for key in ("rank", "alpha", "rslora"))
    alphas = (alpha / 2, alpha, alpha * 2)
    by_rank: dict[float, list[dict[str, float]]] = {}
    for row in found.scalings:
        by_rank.setdefault(row["rank"], []).append(row)
    rows = [
        (
            f"{'→ ' if r == rank else ''}{number(r)}",
            *(number(row["scaling"]) for row in same),
            *(number(row["rslora_scaling"]) for row in same),
        )
        for r, same in by_rank.items()
    ]
    head = ("Rank", *(f"α {number(a)}" for a in alphas), *(f"rsLoRA α {number(a)}" for a in alphas))
    chosen = f"α/{'√r' if rslora else 'r'}"
    _table(console, f"Scaling s (chosen: {chosen} with α {number(alpha)})", head, rows, left=())


def _table(console: Console, title: str, head: tuple[str, ...], rows: list[tuple], left: tuple[int, ...]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    console.print()
    console.print(table)


def _facts(console: Console, lines: list[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in lines:
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)


def _notes(console: Console, notes: list[str]) -> None:
    if notes:
        console.print()
    for note in notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _shape(shape: Any, experts: int = 1) -> str:
    return (f"{experts} of " if experts > 1 else "") + " × ".join(map(str, shape))


def _bytes(value: float) -> str:
    """In powers of 1000, as the field counts parameters and memory here: 7 billion float32 are 28 GB."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} GB" if value < 1000 else f"{value:,.0f} GB"

"""A plan on one screen of a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from veneer.plan import constants
from veneer.plan.bytes import Setting
from veneer.plan.fit import NAMES, Option, Plan, text

PARTS = {
    "base": "frozen base",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "kept": "kept for backward",
    "work": "one block at work",
    "head": "logits of a chunk",
    "workspace": "cuBLAS",
    "pool": "CUDA graphs",
    "slack": "allocator's reserve",
    "context": "CUDA itself",
}


def print_plan(plan: Plan, console: Console, title: str, notes: list[str]) -> None:
    """The chosen setting with its memory, the next best, and why the others were not taken."""
    console.print(title, soft_wrap=True)
    console.print(_settings([plan.chosen, *plan.runners_up]))
    options = [plan.chosen, *plan.runners_up]
    if any(option.setting.keep for option in options):
        console.print("+n: the last n blocks are kept all the same (train.keep_blocks)", style="dim")
    _explain_place(console, options)
    console.print(_memory(plan))
    console.print()
    console.print(_not_taken(plan))
    for note in notes:
        console.print(note, style="dim", soft_wrap=True)


def _settings(options: list[Option]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "quant", "stream", "checkpointing", "optimizer"):
        table.add_column(name, no_wrap=True)
    for name in ("row", "GB", "host GB", "s/step", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, option in enumerate(options):
        s, mark = option.setting, "→" if i == 0 else ""
        dial = f"{s.dial} +{s.keep}" if s.keep else s.dial
        table.add_row(mark, s.quant, _place(s), dial, s.optimizer, *_numbers(option), style=None if i else "bold")
    return table


def _place(setting: Setting) -> str:
    """What of the base is not on the device."""
    if setting.resident:
        return f"{setting.stream} −{setting.resident}"
    return "off*" if setting.embedding == "host" and setting.stream == "off" else setting.stream


def _explain_place(console: Console, options: list[Option]) -> None:
    if any(_place(option.setting) == "off*" for option in options):
        console.print("*: only the input embedding is in host memory (train.embedding: host)", style="dim")
    if any(option.setting.resident for option in options):
        console.print("−n: n blocks stay on the device (train.resident_blocks)", style="dim")


def _numbers(option: Option) -> tuple[str, ...]:
    need, time = option.need, option.time
    host = f"{need.host / 1e9:.1f}" if need.host else ""
    row = f"{option.setting.micro_tokens:,}"
    return row, f"{need.total / 1e9:.2f}", host, f"{time.total:,.2f}", f"{time.tokens_per_second:,.0f}"


def _memory(plan: Plan) -> str:
    need, cuda = plan.chosen.need, plan.budget.cuda
    own = PARTS if cuda else PARTS | {"context": "Python and libraries", "slack": "malloc's reserve"}
    parts = [f"{name} {text(getattr(need, key))}" for key, name in own.items() if getattr(need, key) >= 5e5]
    total = f"{text(need.total)}, with a margin of {constants.MARGIN:.0%} {text(plan.chosen.wanted)}"
    return f"memory: {' + '.join(parts)} = {total}; the peak is in {need.at}"


def _not_taken(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("not taken")
    table.add_column("")
    table.add_column("why")
    last = None
    for why in plan.not_taken:
        name = NAMES[why.axis].rpartition(".")[2] if why.axis != "micro_tokens" else "row"
        value = f"{why.value:,}" if isinstance(why.value, int) else str(why.value)
        table.add_row(name if name != last else "", value, why.reason)
        last = name
    return table


def print_cards(rows: list[tuple[str, int, Option | str]], console: Console, title: str) -> None:
    """What fits on each card: (name, bytes, option or why nothing fits)."""
    console.print(title, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("card", "GiB", "quant", "stream", "checkpointing"):
        table.add_column(name, justify="right" if name == "GiB" else "left", no_wrap=name != "checkpointing")
    for name in ("row", "GB", "host GB", "s/step", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, memory, option in rows:
        size = f"{memory / 2**30:.0f}"
        if isinstance(option, str):
            table.add_row(name, size, "–", "–", option, style="dim")
            continue
        s = option.setting
        table.add_row(name, size, s.quant, _place(s), s.dial, *_numbers(option))
    console.print(table)
    _explain_place(console, [option for _, _, option in rows if not isinstance(option, str)])

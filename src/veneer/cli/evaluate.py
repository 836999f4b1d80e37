"""veneer eval"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from veneer.cli.common import Device, Dtype, Force, Model, Quant, err, open_adapter
from veneer.errors import ConfigError


def command(
    path: Annotated[Path, typer.Argument(help="A run or an adapter directory.", metavar="RUN_OR_ADAPTER")],
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", help="Examples to score on (default: the run's held-out data).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="A fixed subset of so many examples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer (default: half as long again as the longest reference).")
    ] = None,
    base: Annotated[bool, typer.Option(help="Score the base model beside the adapter.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = None,
    force: Force = False,
) -> None:
    """Score an adapter against its base on held-out examples, side by side."""
    from veneer.config import DataConfig, TrainConfig
    from veneer.data.parts import part_of
    from veneer.files import write_text
    from veneer.training.score import score, subset

    opened = open_adapter(path, model, device=device, dtype=dtype, quant=quant, force=force)
    config = TrainConfig.load(opened.run / "config.yaml") if opened.run else None
    options = DataConfig(train=data or "unused", heldout=data) if data or not config else config.data
    if data is None and not (config and (options.heldout or options.heldout_fraction)):
        raise ConfigError("say what to score on with --data: there is no held-out data in a configuration here")
    examples = subset(list(part_of(options, "heldout", config.seed if config else 0)), limit)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err
    ) as bars:
        tasks: dict[str, Any] = {}

        def progress(system: str, done: int, total: int) -> None:
            if system not in tasks:
                tasks[system] = bars.add_task(f"answers of the {system}", total=total)
            bars.update(tasks[system], completed=done)

        systems = ("base", "adapter") if base else ("adapter",)
        result = score(
            opened.model,
            opened.tokenizer,
            examples,
            systems=systems,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    sources = options.heldout or f"{options.heldout_fraction:.0%} of {options.train}"
    result = {"heldout": sources if isinstance(sources, str) else ", ".join(sources)} | result
    if opened.run:
        from veneer.report.page import write_report

        write_text(opened.run / "eval.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        err.print(f"report: {write_report(opened.run)}", soft_wrap=True)
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=1))
    else:
        Console(highlight=False).print(scores_table(result))


def scores_table(result: dict[str, Any]) -> Table:
    """Scores of base and adapter side by side."""
    systems = [s for s in ("base", "adapter") if s in result]
    table = Table(title=f"{result['n']} held-out examples")
    table.add_column("score")
    for system in systems:
        table.add_column(system, justify="right")
    first = result[systems[0]]
    names = {"valid_json": "valid JSON", "exact_match": "exact match", "field_f1_mean": "field F1, mean"}
    for key, label in names.items():
        if key in first:
            table.add_row(label, *(f"{result[s][key]:.1%}" for s in systems))
    for name in first.get("field_f1", {}):
        table.add_row(f"  F1 {name}", *(f"{result[s]['field_f1'].get(name, 0):.1%}" for s in systems))
    table.add_row("answers cut off", *(str(result[s]["cut_off"]) for s in systems))
    return table

"""veneer bench"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from veneer.cli.common import QUANT_HELP, Device, Dtype, err, parse_settings
from veneer.errors import ConfigError


def command(
    model: Annotated[
        str, typer.Argument(help="A known name, a directory (with only a config.json: random weights), a GGUF file.")
    ] = "smollm2-135m-instruct",
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 4,
    length: Annotated[int, typer.Option(min=8, help="Tokens per sequence.")] = 512,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    checkpointing: Annotated[str | None, typer.Option(help="train.checkpointing: what blocks keep.")] = None,
    quant: Annotated[str | None, typer.Option(help=QUANT_HELP)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure, after two to warm up.")] = 5,
    against: Annotated[str | None, typer.Option(help="peft: measure PEFT beside it.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of one step to this file.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of adapter or train, e.g. train.compile=off."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine's rates for veneer plan, and keep them.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure a training step here: tokens/s, share of what the machine could do, and memory by component."""
    if calibrate:
        _calibrate(device, dtype, json)
        return
    settings = {"adapter.rank": rank, "train.micro_batch_tokens": max(16, batch * length)} | parse_settings(set_ or [])
    if checkpointing is not None:
        settings["train.checkpointing"] = checkpointing
    if against not in (None, "peft"):
        raise ConfigError(f"--against {against!r}: Veneer can measure itself against peft")
    results, rate = _run(model, [length] * batch, settings, quant, steps, against, trace, device, dtype)
    if json:
        print(json_module.dumps({"matmul_flops": rate, "results": [one.as_dict() for one in results]}, indent=2))
        return
    Console(highlight=False).print(_table(results))
    err.print(f"limit: the step's products alone, at {rate / 1e12:.3g} TFLOP/s measured here in the same dtype")


def _calibrate(device: str, dtype: str, as_json: bool) -> None:
    import torch

    from veneer.base.load import pick_device, pick_dtype
    from veneer.plan import probe

    place = torch.device(pick_device(device))
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"--calibrate measures cpu or cuda, not {place.type}")
    rates = probe.calibrate(place, pick_dtype(dtype, str(place)))
    if as_json:
        print(json_module.dumps({"device": probe.device_name(place)} | rates.as_dict(), indent=2))
        return
    print(
        f"{probe.device_name(place)}: products {rates.products / 1e12:.3g} TFLOP/s, memory {rates.bandwidth / 1e9:.3g} "
        f"GB/s, host to device {rates.copy / 1e9:.3g} GB/s, disk {rates.disk / 1e9:.3g} GB/s, "
        f"{rates.call * 1e6:.2g} µs to start an operation; veneer plan uses these from now on"
    )


def _run(model, lengths, settings, quant, steps, against, trace, device, dtype):
    """The timings of each side and the rate of products here, in FLOP/s."""
    from contextlib import ExitStack

    from veneer.config import TrainConfig
    from veneer.training import bench

    config = TrainConfig.from_dict({"data": "-", "out": "-", "adapter": {}, "train": {}}, settings)
    found, rate = [], None
    for side in ["veneer", *([against] if against else [])]:
        base = bench.open_model(model, device, dtype, quant)
        place = next(base.parameters()).device
        rate = rate or bench.matmul_rate(place, base.dtype)
        flops = bench.step_flops(base, sum(lengths))
        with ExitStack() as stack:
            if side == "veneer":
                step, parts = bench.veneer_step(base, config.adapter, config.train, lengths, stack)
            else:
                step, parts = bench.peft_step(base, config.adapter, config.train, lengths), {}
            found.append(bench.measure(side, step, sum(lengths), flops, rate, parts, place, steps))
            if trace and side == "veneer":
                bench.trace(step, trace)
                err.print(f"trace: {trace} (open in chrome://tracing or Perfetto)")
        del base, step
    return found, rate


def _table(results: list[Any]) -> Table:
    from veneer.report import text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for one in results:
        table.add_column(one.name, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("tokens/s", [f"{r.tokens_per_second:,.0f}" for r in results]),
        ("step", [f"{1000 * r.step_seconds:,.1f} ms" for r in results]),
        ("first step", [f"{r.first_step_seconds:.1f} s" for r in results]),
        ("share of the limit", [text.percent(r.limit_share) for r in results]),
    ]
    for key in ("base", "adapter", "gradients", "optimiser", "other", "peak"):
        rows.append((f"memory: {key}", [text.size(r.memory.get(key)) for r in results]))
    for name, values in rows:
        table.add_row(name, *values)
    return table

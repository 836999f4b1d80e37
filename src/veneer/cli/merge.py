"""veneer merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from veneer.cli.common import QUANT_HELP, Device, Dtype, Force, locate


def command(
    base: Annotated[str, typer.Argument(help="The float base: a known name, a directory, a GGUF file or a hub id.")],
    adapter: Annotated[Path, typer.Argument(help="A run or an adapter directory.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model directory to make.")],
    quant: Annotated[str | None, typer.Option(help="Write the merged model quantised. " + QUANT_HELP)] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Merge an adapter into its float base and write a model that needs no Veneer, with the logit error of doing so."""
    from veneer.formats.merged import merge_into_float

    folder, _ = locate(adapter)
    report = merge_into_float(folder, base, out, quant, device=device, dtype=dtype, force=force)
    lines = [f"model          {report.path}", f"float merge    {report.exact}"]
    if report.requantised:
        lines += [
            f"against {report.quant} base + adapter",
            f"  written      {report.requantised}",
            f"  naive merge  {report.naive}  (into the rounded weights: not taken)",
            f"  base alone   {report.effect}  (what the adapter does)",
            "against float base + adapter",
            f"  written      {report.to_float['requantised']}",
            f"  naive merge  {report.to_float['naive']}",
            f"  unmerged     {report.to_float['unmerged']}",
        ]
    Console(highlight=False).print("\n".join(lines), soft_wrap=True, markup=False)

"""veneer merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from veneer.cli.common import QUANT_HELP, Device, Force, err, locate

Seed = Annotated[int | None, typer.Option(help="Seed of --stochastic-rounding. Default: 0.")]


def command(
    base: Annotated[str, typer.Argument(help="The float base: a known name, a directory, a GGUF file or a hub id.")],
    adapter: Annotated[Path, typer.Argument(help="A run or an adapter directory.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model directory to make.")],
    quant: Annotated[str | None, typer.Option(help="Write the merged model quantised. " + QUANT_HELP)] = None,
    stochastic: Annotated[
        bool, typer.Option("--stochastic-rounding", help="Round to bfloat16 up or down at random, right on average.")
    ] = False,
    seed: Seed = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare the result with base + adapter before it is put in place."),
    ] = True,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, bfloat16 or float16.")] = "auto",
    force: Force = False,
) -> None:
    """Merge an adapter into its float base and write a model that needs no Veneer, with the logit error of doing so.

    Goes through the base's safetensors files a few rows at a time, so it takes little memory whatever the model's size; the
    same command continues a merge that was cut short. A GGUF base, --quant and what else cannot be streamed are merged in
    memory.
    """
    from veneer.errors import ConfigError
    from veneer.formats.merge_stream import NotStreamable, merge_checkpoint

    if seed is not None and not stochastic:
        raise ConfigError("--seed is for --stochastic-rounding: add it or leave the seed out")
    if quant and (stochastic or not verify):
        raise ConfigError("--quant merges in memory, verified and to nearest: leave the other options out")
    folder, _ = locate(adapter)
    print_lines = Console(highlight=False).print
    if not quant:
        try:
            options = {"dtype": dtype, "device": device, "force": force, "verify": verify}
            report = merge_checkpoint(
                folder, base, out, seed=(seed or 0) if stochastic else None, **options, say=lambda text: err.print(text)
            )
            return print_lines("\n".join(_streamed(report)), soft_wrap=True, markup=False)
        except NotStreamable as reason:
            if stochastic:
                raise ConfigError(f"--stochastic-rounding needs a merge file by file, but {reason}") from None
            err.print(f"merging in memory: {reason}", style="yellow")
    print_lines("\n".join(_in_memory(folder, base, out, quant, device, dtype, force)), soft_wrap=True, markup=False)


def _streamed(report: Any) -> list[str]:
    reused = f", {report.reused} of them finished by an earlier merge" if report.reused else ""
    lines = [f"model          {report.path}  ({report.files} files{reused}; {report.tensors} tensors changed)"]
    if report.untied:
        lines.append(
            "untied         output head and embedding, of which one changed: the model is larger by one of them"
        )
    if report.rounding:
        nearest, stochastic = report.rounding.means()
        lines.append(f"rounding       mean error {stochastic:.3g} stochastic, {nearest:.3g} if rounded to nearest")
    if not report.rows:
        return [*lines, "not verified   (--no-verify)"]
    lines.append(f"checked        {report.rows} rows of the files are W + ΔW")
    if not report.logits:
        return [*lines, f"logits         not compared: {report.why}"]
    lines += [f"float merge    {report.logits}", f"base alone     {report.effect}  (what the adapter does)"]
    if report.logits.mean > 0.5 * report.effect.mean > 0:
        lines.append(
            "warning        rounding costs as much as the adapter does: add --dtype float32, or serve it unmerged"
        )
    return lines


def _in_memory(
    folder: Path, base: str, out: Path, quant: str | None, device: str, dtype: str, force: bool
) -> list[str]:
    from veneer.formats.merged import merge_into_float

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
    return lines

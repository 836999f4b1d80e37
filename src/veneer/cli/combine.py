"""veneer combine"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from veneer.cli.common import Device, base_of, err, locate
from veneer.errors import ConfigError

METHOD_HELP = (
    "cat (exact), svd, linear, ties, dare-linear, dare-ties, della-linear, della, magnitude-prune, breadcrumbs, "
    "breadcrumbs-ties, knots, core, tsv or iso-c."
)


def command(
    adapters: Annotated[list[Path], typer.Argument(help="Runs or adapter directories.", metavar="ADAPTER…")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter directory to make.")],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", "-w", help="One number each, 0.7,-0.3; or a YAML or JSON file {layer pattern: [0.7, -0.3]}."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "cat",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Truncate the result to this rank (svd: the largest given).")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of the values kept.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Breadcrumbs: share of the largest values dropped.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="DELLA: half the range of the probabilities.")] = None,
    scale: Annotated[float, typer.Option(help="Multiply the result (TIES' lambda).")] = 1.0,
    space: Annotated[
        str | None, typer.Option(help="Where values are chosen: full (ΔW), factors (A and B apart), core or knots.")
    ] = None,
    like: Annotated[str | None, typer.Option(help="Where they differ, do as peft or mergekit.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random methods.")] = 0,
    dtype: Annotated[str, typer.Option(help="Storage of the result: float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Combine adapters of different bases all the same.")] = False,
    tune_on: Annotated[
        str | None,
        typer.Option(help="Examples to find the weights on, by gradient through the base; --weights is the start."),
    ] = None,
    tune_steps: Annotated[int, typer.Option(min=1, help="Steps of the search.")] = 40,
    tune_examples: Annotated[int, typer.Option(min=1, help="Use the first so many examples.")] = 32,
    tune_l1: Annotated[float, typer.Option(min=0.0, help="Weight of the sum of the weights' sizes.")] = 0.05,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The base of --tune-on and --verify (default: what the adapters name)."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Load the base, and compare the logits of the result and the stacked adapters."),
    ] = False,
) -> None:
    """Combine adapters of one base into one adapter, and say how far it is from their weighted sum."""
    import torch

    from veneer.formats.combine import check_free, combine, parse_weights

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype is float32, bfloat16 or float16, not {dtype!r}")
    folders, console = [locate(path)[0] for path in adapters], Console(highlight=False)
    chosen = parse_weights(weights)
    check_free(out)  # before a search that takes minutes
    settings = {"rank": rank, "density": density, "gamma": gamma, "epsilon": epsilon, "space": space, "like": like}
    options = {
        "method": method,
        "scale": scale,
        "seed": seed,
        "dtype": getattr(torch, dtype),
        "force": force,
        **settings,
    }
    if model is not None and tune_on is None and not verify:
        raise ConfigError("--model is for --tune-on and --verify: combining does not need the base")
    if verify and isinstance(chosen, dict):
        raise ConfigError("--verify stacks the adapters, which have one weight each: not with a file of weights")
    if tune_on is not None:
        from veneer.training.tune import tune_weights

        if isinstance(chosen, dict):
            raise ConfigError("--tune-on finds one weight for each adapter: start it from numbers, not from a file")
        tuned = tune_weights(
            folders,
            tune_on,
            model or base_of(folders[0]),
            start=chosen,
            steps=tune_steps,
            examples=tune_examples,
            l1=tune_l1,
            device=device,
            force=force,
            note=lambda text: err.print(text, markup=False),
        )
        chosen = tuned.weights
        console.print(str(tuned), soft_wrap=True, markup=False)
    with Progress(TextColumn("layers"), BarColumn(), MofNCompleteColumn(), console=err, transient=True) as bars:
        task = bars.add_task("", total=None)

        def progress(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        report = combine(folders, out, weights=chosen, device=device, progress=progress, **options)
    console.print(str(report), soft_wrap=True, markup=False)
    if verify:
        from veneer.formats.combine_check import check_on_base

        exact = method == "cat" and scale == 1.0 and dtype == "float32"
        base = model or base_of(folders[0])
        error = check_on_base(base, folders, chosen, out, exact=exact, force=force, device=device)
        console.print(f"  on {base}: {error}, against the stacked adapters", soft_wrap=True, markup=False)

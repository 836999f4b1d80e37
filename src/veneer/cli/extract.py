"""veneer extract"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from veneer.cli.resize import span


def command(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model: a directory or a hub id.")],
    base: Annotated[
        str, typer.Argument(help="The base that it was tuned from: a known name, a directory or a hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter directory to make.")],
    rank: Annotated[int | None, typer.Option(help="Rank of each layer; with --energy the largest.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Keep this share of each layer's ‖ΔW‖², such as 0.99, with the smallest rank that does."),
    ] = None,
    save_modules: Annotated[
        bool,
        typer.Option(
            "--save-modules", help="Take embeddings, norms and biases that changed whole, instead of leaving them out."
        ),
    ] = False,
) -> None:
    """Extract a LoRA adapter from a fine-tuned model and its base, and show how much of the change it holds."""
    from veneer.formats.extract import extract

    found = extract(tuned, base, out, rank=rank, energy=energy, save_modules=save_modules)
    worst = max(found.errors, key=found.errors.__getitem__)
    lines = [
        f"adapter  {found.path}",
        f"rank     {span(list(found.ranks.values()))} in {len(found.ranks)} layers; {found.unchanged} linears are unchanged",
        f"error    {found.error:.2%} of all updates of linears (‖ΔW − B·A‖/‖ΔW‖)",
        f"worst    {found.errors[worst]:.2%} in {worst}",
    ]
    for names, what in (
        (found.kept, "other changed parameters are taken whole"),
        (found.left, "other changed parameters are left out (--save-modules takes them)"),
        (found.unread, "parameters are stored in another form than the model's and were not compared"),
    ):
        if names:
            lines.append(f"besides  {len(names)} {what}, first {names[0]}")
    Console(highlight=False).print("\n".join(lines), soft_wrap=True, markup=False)

"""veneer resize"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from veneer.cli.common import locate


def command(
    adapter: Annotated[Path, typer.Argument(help="A run or an adapter directory.", metavar="RUN_OR_ADAPTER")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter directory to make.")],
    rank: Annotated[int | None, typer.Option(help="The largest rank that a layer keeps.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep this share of ‖ΔW‖², such as 0.99, with the smallest rank that does.")
    ] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="With --energy: each layer its own rank.")] = False,
) -> None:
    """Truncate an adapter to a smaller rank by SVD, and show what that loses.

    pissa, olora, corda and lora_ga are saved with twice their rank: this brings them back.
    """
    from veneer.formats.resize import resize

    found = resize(locate(adapter)[0], out, rank=rank, energy=energy, per_layer=per_layer)
    before, after = ([pair[i] for pair in found.ranks.values()] for i in (0, 1))
    lines = [
        f"adapter  {found.path}",
        f"rank     {span(before)} → {span(after)} in {len(after)} layers",
        f"error    {found.error:.2%} of all updates (‖ΔW − ΔW_r‖/‖ΔW‖)",
        f"worst    {found.errors[found.worst]:.2%} in {found.worst}",
    ]
    Console(highlight=False).print("\n".join(lines), soft_wrap=True, markup=False)


def span(ranks: list[int]) -> str:
    """A rank, or the range of several."""
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"

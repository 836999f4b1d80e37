"""veneer reduce"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from veneer.cli.common import locate


def command(
    adapter: Annotated[Path, typer.Argument(help="A run or an adapter directory.", metavar="RUN_OR_ADAPTER")],
    rank: Annotated[int, typer.Option(min=1, help="The largest rank that a module keeps.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter directory to make.")],
) -> None:
    """Reduce an adapter's rank by SVD, and show what that loses; pissa, olora, corda and lora_ga are saved with twice it."""
    from veneer.formats.reduced import reduce_adapter

    found = reduce_adapter(locate(adapter)[0], out, rank)
    worst = max(found.errors, key=found.errors.get)
    lines = [
        f"adapter  {found.path}",
        f"error    {found.total:.2%} of all updates (‖ΔW − ΔW_r‖/‖ΔW‖)",
        f"worst    {found.errors[worst]:.2%} in {worst}",
    ]
    Console(highlight=False).print("\n".join(lines), soft_wrap=True, markup=False)

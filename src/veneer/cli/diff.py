"""veneer diff"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from veneer.cli.common import locate

SHOWN = 5


def command(
    a: Annotated[Path, typer.Argument(help="A run or an adapter directory.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Another of the same base.", metavar="B")],
    as_json: Annotated[bool, typer.Option("--json", help="Print every layer's numbers as JSON.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Compare adapters of different bases all the same.")] = False,
) -> None:
    """Compare two adapters layer by layer: cosine and distance of their updates, overlap of the spaces they act on."""
    from veneer.formats.resize import diff

    found = diff(locate(a)[0], locate(b)[0], force=force)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    Console(highlight=False).print("\n".join(_lines(found)), soft_wrap=True, markup=False)


def _lines(found: Any) -> list[str]:
    lines = [f"all layers   cosine {found.cosine:.4f}, distance {found.distance:.2%} of A's size"]
    lines.append(
        f"layers       {len(found.layers)} in both, {len(found.only_a)} only in A, {len(found.only_b)} only in B"
    )
    if found.other:
        lines.append(f"besides      {len(found.other)} other tensors differ, first {found.other[0]}")
    ranked = sorted((layer for layer in found.layers if layer.cosine == layer.cosine), key=lambda layer: layer.cosine)
    few = len(ranked) <= 2 * SHOWN
    groups = (
        [("layers, least alike first", ranked)]
        if few
        else [("least alike", ranked[:SHOWN]), ("most alike", ranked[-SHOWN:])]
    )
    for title, layers in groups:
        lines.append(f"{title}: cosine, distance, ‖ΔW_A‖, ‖ΔW_B‖, overlap of input spaces, of output spaces")
        lines += [
            f"  {x.cosine:+.4f} {x.distance:9.2%} {x.norm_a:9.3g} {x.norm_b:9.3g} {x.inputs:7.3f} {x.outputs:7.3f}  {x.name}"
            for x in layers
        ]
    return lines

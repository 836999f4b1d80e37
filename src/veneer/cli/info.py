"""veneer info"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def command(
    path: Annotated[Path, typer.Argument(help="A run or an adapter directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """What an adapter or a run is: rank, alpha, targets, sizes, base, scores."""
    from veneer.report.info import describe, print_info

    info = describe(path)
    if as_json:
        print(json.dumps(info.as_dict(), indent=2, ensure_ascii=False))
    else:
        print_info(info, Console(highlight=False))

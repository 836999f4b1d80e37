"""veneer import"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.common import Device, Dtype
from veneer.cli.export import NoVerify, show


def command(
    source: Annotated[Path, typer.Argument(help="A GGUF adapter, an MLX directory, or torchtune's file or directory.")],
    source_format: Annotated[str, typer.Option("--from", help="gguf, mlx or torchtune.")],
    base: Annotated[str, typer.Option("--base", "-m", help="A known name, a directory, a GGUF file or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter directory to make, in PEFT's format.")],
    alpha: Annotated[
        float | None, typer.Option(help="torchtune's lora_alpha, where no file beside it says so.")
    ] = None,
    no_verify: NoVerify = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Read an adapter of llama.cpp, MLX or torchtune into PEFT's format, exactly; checked on its base."""
    from veneer.formats.exchange import import_adapter

    done = import_adapter(
        source, out, source_format, base, alpha=alpha, verify=not no_verify, device=device, dtype=dtype
    )
    effect = done.effect
    show(
        done,
        f"on {base}: it moves logits by max {effect.max:.2g}, mean {effect.mean:.2g}" if effect else "no (--no-verify)",
    )

"""veneer export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.common import Device, Dtype, Force, base_of, locate

NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Do not load the base to compare logits (a base too large for this machine)."),
]


def command(
    adapter: Annotated[Path, typer.Argument(help="A run or an adapter directory.", metavar="RUN_OR_ADAPTER")],
    to: Annotated[str, typer.Option("--to", help="peft, gguf (llama.cpp) or mlx.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory (peft, mlx) or file (gguf) to make.")],
    engine: Annotated[
        str | None, typer.Option("--for", help="vllm: one scaling and one rank that vLLM allows, nothing it ignores.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", "-m", help="The base. Default: as the adapter says.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="With --to gguf: base and adapter as one model.")] = False,
    converter: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's convert_hf_to_gguf.py, for --merged on a base that is no GGUF file."),
    ] = None,
    out_type: Annotated[str, typer.Option(help="With --merged: f32, f16 or bf16.")] = "f16",
    no_verify: NoVerify = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Write an adapter for vLLM, llama.cpp or MLX, or a merged GGUF; read back and compared before it is put in place."""
    from veneer.errors import ConfigError
    from veneer.formats.exchange import export_adapter, export_merged

    if merged and to != "gguf":
        raise ConfigError("--merged goes with --to gguf; for a transformers model use veneer merge")
    folder, _ = locate(adapter)
    options = {"verify": not no_verify, "device": device, "dtype": dtype, "force": force}
    base = base or base_of(folder)
    if merged:
        done = export_merged(folder, out, base, converter=converter, out_type=out_type, **options)
    else:
        done = export_adapter(folder, out, to, base, engine=engine, **options)
    show(done)


def show(done, imported: str | None = None) -> None:
    """What was written and how near it is."""
    from rich.console import Console

    lines = [f"written   {done.path}: {done.layers} modules, rank {done.rank}", *(f"note      {n}" for n in done.notes)]
    lines += [f"verified  {done.verified or 'no (--no-verify)'}"] if not imported else [f"loaded    {imported}"]
    Console(highlight=False).print("\n".join(lines), soft_wrap=True, markup=False)

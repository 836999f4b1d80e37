"""Take an adapter to other programs' formats and back; nothing is in place before it has been read back and compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import AdapterFormatError, ConfigError
from veneer.files import settle, staged
from veneer.formats.adapter_file import AdapterFile, read_adapter, write_adapter
from veneer.formats.gguf import read_gguf, write_gguf
from veneer.formats.gguf_model import CONVERTER, TYPES, convert, find_converter, merge_gguf
from veneer.formats.merged import merge_into_float
from veneer.formats.mlx import read_mlx, write_mlx
from veneer.formats.shape import base_shape
from veneer.formats.torchtune import read_torchtune
from veneer.formats.verify import LogitError, Verified, effect_of, verify_adapter
from veneer.formats.vllm import for_vllm

EXPORTS = ("peft", "gguf", "mlx")
IMPORTS = ("gguf", "mlx", "torchtune")


@dataclass(frozen=True)
class Exchanged:
    """What was written. `verified` is None where that was declined; `notes` are for the user."""

    path: Path
    layers: int
    rank: int
    """The largest."""
    verified: Verified | None = None
    effect: LogitError | None = None
    """Of an import: what the adapter does to its base's logits."""
    notes: list[str] = field(default_factory=list)


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    to: str,
    base: str | Path,
    *,
    engine: str | None = None,
    verify: bool = True,
    force: bool = False,
    **options: Any,
) -> Exchanged:
    """Write an adapter as PEFT's (for engine "vllm": in the one form that it serves right), GGUF's or MLX's.

    `verify` reloads the result on the base and compares the logits; `options` (device, dtype) go to `load_base`. Raises
    `ConfigError`, `AdapterFormatError` (what the format does not hold), `BaseModelError` (the result differs).
    """
    if to not in EXPORTS:
        raise ConfigError(f"to: {to!r} is none of {', '.join(EXPORTS)}")
    if engine not in (None, "vllm") or engine and to != "peft":
        raise ConfigError("for: vllm is the one engine with a form of its own, and that is PEFT's (--to peft)")
    source = read_adapter(adapter)
    with _staged(out) as (built, folder):
        back, notes = built, []
        if to == "peft":
            if engine:
                result = for_vllm(source)
                write_adapter(result, built)
                notes += [f"serve it with --max-lora-rank {result.fields['r']}", *_outer(result)]
            else:
                result = source
                shutil.copytree(adapter, built)  # with the tokenizer, where it has new tokens
        else:
            shape = base_shape(base)
            name = source.fields.get("base_model_name_or_path") or str(base)
            if to == "mlx":
                write_mlx(source, built, shape.blocks, shape.tied, name)
                result = read_mlx(built, set(shape.embeddings), shape.tied, name)
            else:
                write_gguf(source, built, shape)
                result = read_gguf(built, shape)
            back = write_adapter(result, folder / "back")
        found = verify_adapter(base, adapter, back, force=force, **options) if verify else None
        return Exchanged(Path(out), len(result.layers), _rank(result), found, notes=notes)


def import_adapter(
    source: str | Path,
    out: str | Path,
    source_format: str,
    base: str | Path,
    *,
    alpha: float | None = None,
    verify: bool = True,
    **options: Any,
) -> Exchanged:
    """Write a GGUF, MLX or torchtune adapter in PEFT's format. `alpha` is torchtune's lora_alpha, where no file says it.

    `verify` loads the result on the base, which checks every name and shape, and measures what it does to the logits.
    Raises `ConfigError`, `AdapterFormatError`, `BaseModelError`.
    """
    if source_format not in IMPORTS:
        raise ConfigError(f"from: {source_format!r} is none of {', '.join(IMPORTS)}")
    source = Path(source)
    if not source.exists():
        raise AdapterFormatError(f"{source}: no such file or directory")
    shape = base_shape(base)
    if source_format == "gguf":
        result = read_gguf(source, shape)
    elif source_format == "mlx":
        result = read_mlx(source, set(shape.embeddings), shape.tied, str(base))
    else:
        result = read_torchtune(source, shape, alpha)
    with _staged(out) as (built, _):
        write_adapter(result, built)
        found = effect_of(base, built, **options) if verify else None
        return Exchanged(Path(out), len(result.layers), _rank(result), effect=found)


def export_merged(
    adapter: str | Path,
    out: str | Path,
    base: str | Path,
    *,
    converter: str | Path | None = None,
    out_type: str = "f16",
    verify: bool = True,
    force: bool = False,
    **options: Any,
) -> Exchanged:
    """Write base + adapter as one GGUF model.

    Over a base that is a GGUF file, ΔW is added tensor by tensor and the metadata stays; over any other, llama.cpp's own
    converter (`converter`, or on PATH) runs on the merged model. Raises as `export_adapter` does.
    """
    if out_type not in TYPES:
        raise ConfigError(f"out type {out_type!r} is none of {', '.join(TYPES)}")
    source, script, shape = read_adapter(adapter), find_converter(converter), base_shape(base)
    if shape.gguf is None and script is None:
        raise ConfigError(
            f"a merged GGUF of {base} needs llama.cpp's {CONVERTER}: git clone https://github.com/ggml-org/llama.cpp, "
            f"pip install -r llama.cpp/requirements.txt and pass --converter llama.cpp; or pass --base a GGUF file; or "
            f"export the adapter alone"
        )
    with _staged(out) as (built, folder):
        if script is None or shape.gguf and converter is None:
            write_gguf(source, folder / "adapter.gguf", shape)
            merge_gguf(shape.gguf, folder / "adapter.gguf", built, out_type)
        else:
            merge_into_float(adapter, base, folder / "merged", force=force, **options)
            convert(script, folder / "merged", built, out_type)
        found = None
        if verify:
            found = verify_adapter(base, adapter, built, force=force, merged_as=TYPES[out_type], **options)
        return Exchanged(Path(out), len(source.layers), _rank(source), found)


def _rank(adapter: AdapterFile) -> int:
    return max((f.rank for f in adapter.layers.values()), default=0)


def _outer(adapter: AdapterFile) -> list[str]:
    outer = [path for path, f in adapter.layers.items() if f.embedding or path.endswith("lm_head")]
    return [f"vLLM adapts {outer[0]} only in models that declare it: check its start-up log"] if outer else []


@contextmanager
def _staged(out: str | Path) -> Iterator[tuple[Path, Path]]:
    """(a place to build in, a folder for scratch) beside `out`; what was built is put in place at the end."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists: choose another place")
    with staged(out) as folder:
        built = folder / f"built{out.suffix}"
        yield built, folder
        settle(built)
        if out.is_dir():
            out.rmdir()
        os.replace(built, out)

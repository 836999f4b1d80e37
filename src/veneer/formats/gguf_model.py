"""A merged model in GGUF: over a GGUF base tensor by tensor, over any other through llama.cpp's own converter."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from veneer.errors import AdapterFormatError, BaseModelError, ConfigError
from veneer.formats.gguf import EMBEDDING, finish, read_factors

CONVERTER = "convert_hf_to_gguf.py"
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def find_converter(path: str | Path | None) -> Path | None:
    """llama.cpp's converter: the one given, or one on PATH. Raises `ConfigError` where the given one is none."""
    if path is None:
        found = shutil.which(CONVERTER)
        return Path(found) if found else None
    path = Path(path) / CONVERTER if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; --converter takes llama.cpp's {CONVERTER} or its directory")
    return path


def convert(converter: Path, model: Path, out: Path, out_type: str) -> None:
    """Run llama.cpp's converter on a model directory. Raises `BaseModelError` with its last words."""
    command = [sys.executable, str(converter), str(model), "--outfile", str(out), "--outtype", out_type]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode or not out.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise BaseModelError(f"{converter.name} failed on the merged model: {lines[-1] if lines else done.returncode}")


def merge_gguf(base: Path, adapter: Path | None, out: Path, out_type: str = "f16") -> None:
    """Write a GGUF model with a GGUF adapter added to its weights, W + s·B·A, computed in float32 and rounded once.

    Matrices get `out_type`, everything else stays as it is, metadata too. Holds one tensor at a time. `adapter` None only
    dequantises. Raises `AdapterFormatError` and `BaseModelError`.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    factors = read_factors(adapter)[0] if adapter else {}
    try:
        reader = GGUFReader(base)
    except (OSError, ValueError, IndexError) as error:
        raise BaseModelError(f"{base} is damaged or no GGUF file: {error}") from None
    missing = factors.keys() - {t.name for t in reader.tensors}
    if missing:
        raise AdapterFormatError(f"{base} has no tensor {sorted(missing)[0]}, which the adapter changes")
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    kind = GGMLQuantizationType[out_type.upper()]
    writer.add_file_type(LlamaFileType["ALL_F32" if out_type == "f32" else f"MOSTLY_{out_type.upper()}"])
    width = np.dtype(np.float32 if out_type == "f32" else np.float16)
    for t in reader.tensors:
        shape = [int(n) for n in reversed(t.shape)]
        if len(shape) > 1:
            writer.add_tensor_info(t.name, shape, width, int(t.n_elements) * width.itemsize, kind)
        else:
            writer.add_tensor_info(t.name, t.data.shape, t.data.dtype, t.data.nbytes, t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in reader.tensors:
        data = t.data
        if len(t.shape) > 1:
            weight = dequantize(t.data, t.tensor_type)
            if t.name in factors:
                weight = weight + _delta(t.name, *factors[t.name], weight.shape)
            data = quantize(np.ascontiguousarray(weight), kind)
        writer.write_tensor_data(data)
    finish(writer, out)


def _delta(name: str, a, b, scaling: float, shape: tuple[int, ...]) -> np.ndarray:
    delta = scaling * (a @ b.T if name == EMBEDDING else b @ a)
    if tuple(delta.shape) != tuple(shape):
        raise AdapterFormatError(f"{name} is {tuple(shape)} in the base and {tuple(delta.shape)} in the adapter")
    return delta.numpy()

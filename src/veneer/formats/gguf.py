"""LoRA adapters in llama.cpp's GGUF format, both ways.

Metadata: general.type "adapter", general.architecture, adapter.type "lora", adapter.lora.alpha; tensors
<name>.weight.lora_a (rank, d_in) and .lora_b (d_out, rank) by the `gguf` package's own names. llama.cpp scales each
layer by alpha / its own rank: every other scaling is folded into lora_b. An alpha of 0 means scaling 1.
"""

from __future__ import annotations

import errno
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterFormatError, BaseModelError
from veneer.formats.adapter_file import AdapterFile, Factors
from veneer.formats.mlx import factor_pairs
from veneer.formats.portable import lora_fields, most_common, plain_layers, rescaled, transposed
from veneer.formats.shape import BaseShape

ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "smollm3": ("SMOLLM3", True),
    "arcee": ("ARCEE", True),
    "granite": ("GRANITE", True),
    "olmo": ("OLMO", True),
    "olmo2": ("OLMO2", False),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
    "gemma3_text": ("GEMMA3", False),
    "phi3": ("PHI3", False),
    "cohere": ("COMMAND_R", False),
    "cohere2": ("COHERE2", False),
    "starcoder2": ("STARCODER2", False),
    "stablelm": ("STABLELM", False),
}
"""transformers' model_type → (gguf's architecture, whether llama.cpp interleaves the two rotary halves of q and k)."""
EMBEDDING = "token_embd.weight"
KEYS = {"type": "adapter.type", "alpha": "adapter.lora.alpha", "invocation": "adapter.alora.invocation_tokens"}


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads·d, …) of each head from halves, i and i + d/2, to pairs, 2i and 2i + 1: llama.cpp's rotary order."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def halved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def tensor_names(base: BaseShape) -> dict[str, str]:
    """llama.cpp's tensor name of each adaptable module of the base. Raises `BaseModelError` (architecture)."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(getattr(MODEL_ARCH, architecture(base)[0]), base.blocks)
    found = {path: names.get_name(path) for path in base.modules}
    return {path: f"{name}.weight" for path, name in found.items() if name}


def architecture(base: BaseShape) -> tuple[str, bool]:
    """(gguf's architecture, whether it permutes q and k). Raises `BaseModelError`."""
    kind = base.config.model_type
    if kind not in ARCHITECTURES:
        raise BaseModelError(
            f"{base.name} is a {kind} model, whose layout in llama.cpp Veneer does not know (it knows "
            f"{', '.join(sorted(ARCHITECTURES))}): use llama.cpp's convert_lora_to_gguf.py"
        )
    return ARCHITECTURES[kind]


def write_gguf(adapter: AdapterFile, file: Path, base: BaseShape) -> None:
    """Write an adapter for llama.cpp, in float32. Raises `AdapterFormatError` for what the format does not hold."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFValueType, GGUFWriter

    kind, permutes = architecture(base)
    layers, names = plain_layers(adapter, "GGUF", {"aLoRA"}), tensor_names(base)
    alpha = float(torch.tensor(most_common(f.scaling * f.rank for f in layers.values())))  # a float32 in the file
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[getattr(MODEL_ARCH, kind)])
    writer.add_type("adapter")
    writer.add_string(KEYS["type"], "lora")
    writer.add_float32(KEYS["alpha"], alpha)
    if tokens := adapter.fields.get("alora_invocation_tokens"):
        writer.add_key_value(KEYS["invocation"], list(tokens), GGUFValueType.ARRAY, GGUFValueType.UINT32)
    for path, f in layers.items():
        _check_place(adapter, path, f, base, names)
        scaled = f.scaling * f.rank / alpha
        f = f if math.isclose(scaled, 1.0, rel_tol=1e-7) else rescaled(f, alpha / f.rank)
        lora_A, lora_B = f.lora_A.float(), f.lora_B.float()
        leaf = path.rpartition(".")[2]
        if permutes and leaf in ("q_proj", "k_proj"):
            lora_B = interleaved(lora_B, base.heads(leaf))
        lora_A = transposed(lora_A) if names[path] == EMBEDDING else lora_A
        writer.add_tensor(f"{names[path]}.lora_a", lora_A.contiguous().numpy())
        writer.add_tensor(f"{names[path]}.lora_b", lora_B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    finish(writer, file)


def finish(writer: Any, file: Path) -> None:
    """Close a GGUF file. Raises `OSError` where less of it arrived than was written: numpy says nothing of a full disk."""
    written = writer.fout[0].tell()
    writer.close()
    if file.stat().st_size < written:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _check_place(adapter: AdapterFile, path: str, f: Factors, base: BaseShape, names: dict[str, str]) -> None:
    if path not in names:
        raise AdapterFormatError(f"{adapter.path}: {path} has no tensor in llama.cpp's {base.config.model_type} model")
    if base.tied and (path == base.tied or path.endswith("lm_head")):
        raise AdapterFormatError(
            f"{adapter.path}: {path} is adapted and shares its weight with the {'head' if path == base.tied else 'embedding'}"
            f": llama.cpp has one tensor for both and cannot adapt one of them: merge it into the base (veneer merge)"
        )
    weight = base.modules[path].weight
    wanted = tuple(weight.shape) if not f.embedding else tuple(weight.shape)[::-1]
    if (f.lora_B.shape[0], f.lora_A.shape[1]) != wanted:
        raise AdapterFormatError(f"{adapter.path}: {path} does not fit {base.name}, whose weight is {wanted}")


def read_factors(file: Path) -> tuple[dict[str, tuple[Tensor, Tensor, float]], dict[str, Any]]:
    """({tensor name: (lora_a, lora_b, scaling)} as in the file, in float32; {metadata key: value}).

    Raises `AdapterFormatError` (no GGUF, no LoRA adapter, a factor missing).
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(file)
        tensors = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    except (OSError, ValueError, IndexError, KeyError, NotImplementedError) as error:
        raise AdapterFormatError(f"{file} is damaged or no GGUF file: {error}") from None
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta.get("general.type") != "adapter" or meta.get(KEYS["type"]) != "lora":
        raise AdapterFormatError(
            f"{file} is a GGUF file of a {meta.get('general.type', 'model')}, not of a LoRA adapter"
        )
    alpha = float(meta.get(KEYS["alpha"]) or 0.0)
    pairs = factor_pairs(tensors, ".lora_a", ".lora_b", file)
    return {name: (a, b, alpha / b.shape[1] if alpha else 1.0) for name, (a, b) in pairs.items()}, meta


def read_gguf(file: Path, base: BaseShape) -> AdapterFile:
    """A GGUF adapter as PEFT's, in float32. Raises `AdapterFormatError`."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

    pairs, meta = read_factors(file)
    kind, permutes = architecture(base)
    own = MODEL_ARCH_NAMES[getattr(MODEL_ARCH, kind)]
    if meta.get("general.architecture") != own:
        raise AdapterFormatError(f"{file} is for {meta.get('general.architecture')} models, {base.name} is {own}")
    paths = {name: path for path, name in tensor_names(base).items()}
    layers = {}
    for name, (a, b, scaling) in pairs.items():
        if name not in paths:
            raise AdapterFormatError(f"{file}: {name} is no tensor of {base.name} that can be adapted")
        path, leaf = paths[name], paths[name].rpartition(".")[2]
        if permutes and leaf in ("q_proj", "k_proj"):
            b = halved(b, base.heads(leaf))
        layers[path] = Factors(transposed(a) if name == EMBEDDING else a, b, scaling, path in base.embeddings)
    fields = lora_fields(layers, base.name)
    if tokens := meta.get(KEYS["invocation"]):
        fields["alora_invocation_tokens"] = list(tokens)
    return replace(AdapterFile(file, fields), layers=layers)

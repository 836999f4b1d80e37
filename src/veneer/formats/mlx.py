"""MLX adapters (mlx-lm): adapters.safetensors and adapter_config.json, both ways.

<path>.lora_a (d_in, rank) and <path>.lora_b (rank, d_out) are PEFT's factors transposed; y = W x + scale·(x a) b with
one rank and one scale, α/r itself. mlx-lm puts adapters on the modules named in `keys` of the last num_layers blocks;
one that the file leaves out keeps b = 0 there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from veneer.errors import AdapterFormatError
from veneer.files import read_object
from veneer.formats.adapter_file import AdapterFile, Factors
from veneer.formats.portable import lora_fields, plain_layers, transposed, uniform

BLOCK = re.compile(r"(.+?\.)?layers\.(\d+)\.(.+)")
TENSORS, CONFIG = "adapters.safetensors", "adapter_config.json"


def write_mlx(adapter: AdapterFile, folder: Path, blocks: int, tied: str | None, base: str | None) -> None:
    """Write an adapter for a model of `blocks` blocks; `tied` is the embedding that the head shares, if it does.

    Mixed ranks are padded with zeros and mixed scalings folded into lora_b. Raises `AdapterFormatError`.
    """
    layers = dict(plain_layers(adapter, "MLX"))
    if tied in layers:
        if not adapter.fields.get("ensure_weight_tying"):
            raise AdapterFormatError(
                f"{adapter.path}: {tied} is adapted and shared with the output head, which this adapter leaves alone; MLX "
                f"would adapt both: train it with tied_head: both, or merge it into the base (veneer merge)"
            )
        layers = {path: f for path, f in layers.items() if path == tied or not path.endswith("lm_head")}
    elif tied and any(path.endswith("lm_head") for path in layers):
        raise AdapterFormatError(
            f"{adapter.path}: lm_head is adapted, which an MLX model with a tied head does not have"
        )
    layers = uniform(layers)
    one = next(iter(layers.values()))
    found = {path: BLOCK.fullmatch(path) for path in layers}
    keys = {match[3] if match else path for path, match in found.items()}
    first = min((int(match[2]) for match in found.values() if match), default=0)
    config = {
        "fine_tune_type": "lora",
        "model": base,
        "num_layers": blocks - first,
        "lora_parameters": {
            "rank": one.rank,
            "scale": one.scaling,
            "dropout": adapter.fields.get("lora_dropout") or 0.0,
            "keys": sorted(keys),
        },
    }
    tensors = {}
    for path, f in layers.items():
        tensors |= {f"{path}.lora_a": transposed(f.lora_A), f"{path}.lora_b": transposed(f.lora_B)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "mlx"})
    (folder / CONFIG).write_text(json.dumps(config, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def read_mlx(folder: Path, embeddings: set[str], tied: str | None, base: str | None) -> AdapterFile:
    """An MLX adapter as PEFT's; `embeddings` are the paths of the base's embeddings. Raises `AdapterFormatError`."""
    config = read_object(folder / CONFIG)
    if config.get("fine_tune_type", "lora") != "lora":
        raise AdapterFormatError(f"{folder}: fine_tune_type {config['fine_tune_type']!r}; Veneer imports lora")
    scale = (config.get("lora_parameters") or {}).get("scale")
    if not isinstance(scale, (int, float)):
        raise AdapterFormatError(f"{folder / CONFIG} has no lora_parameters.scale")
    pairs = factor_pairs(read_safetensors(folder / TENSORS), ".lora_a", ".lora_b", folder)
    layers = {
        path: Factors(transposed(a), transposed(b), float(scale), path in embeddings) for path, (a, b) in pairs.items()
    }
    dropout = (config.get("lora_parameters") or {}).get("dropout") or 0.0
    fields = lora_fields(layers, base) | {"lora_dropout": dropout, "ensure_weight_tying": tied in layers}
    return AdapterFile(folder, fields, layers=layers)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises `AdapterFormatError`."""
    try:
        with safe_open(file, "pt") as data:
            return {key: data.get_tensor(key) for key in data.keys()}
    except FileNotFoundError:
        raise AdapterFormatError(f"{file} is missing") from None
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{file} is damaged or no safetensors file: {error}") from None


def factor_pairs(tensors: Mapping[str, Any], a: str, b: str, source: object) -> dict[str, tuple[Any, Any]]:
    """{path: (a, b)} of the tensors whose names end in `a` and `b`. Raises `AdapterFormatError` for any other."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        end = next((end for end in (a, b) if key.endswith(end)), None)
        if end is None:
            raise AdapterFormatError(f"{source}: {key} is no factor of a LoRA")
        if value.ndim != 2:
            raise AdapterFormatError(f"{source}: {key} has {value.ndim} dimensions, not 2 (experts?): not imported")
        found.setdefault(key.removesuffix(end), {})[end] = value
    if not found:
        raise AdapterFormatError(f"{source} holds no factors")
    for path, pair in found.items():
        if len(pair) != 2:
            raise AdapterFormatError(f"{source}: {path} lacks one of its two factors")
    return {path: (pair[a], pair[b]) for path, pair in found.items()}

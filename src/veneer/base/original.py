"""A base's weights as its checkpoint has them, whatever loading made of them (quantised, say)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.errors import BaseModelError


def float_weights(model: Any) -> Callable[[str], Any]:
    """A function from module name to that module's weight in the checkpoint that `model` was loaded from.

    One tensor is read at a time. Raises `BaseModelError` (no safetensors checkpoint; no such weight, or it is stored
    quantised).
    """
    info = getattr(model, "veneer_base", None)
    source = info.source if info else model.config._name_or_path
    files = checkpoint_files(source, info.revision if info else None)
    prefix = getattr(model, "base_model_prefix", "") + "."

    def read(name: str) -> Any:
        from safetensors import safe_open

        key = f"{name}.weight"
        key = key if key in files else key.removeprefix(prefix)  # a checkpoint of the body alone
        if key not in files:
            raise BaseModelError(f"{source} holds no tensor {name}.weight")
        with safe_open(files[key], "pt") as data:
            weight = data.get_tensor(key)
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise BaseModelError(f"{source}: {key} is stored as {weight.dtype}: its weights from before are not there")
        return weight

    return read


def checkpoint_files(source: str, revision: str | None = None) -> dict[str, str]:
    """Tensor name → file that holds it, of a directory or what the hub's cache has. Raises `BaseModelError`."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        return cached_file(
            source, file, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )

    index = find("model.safetensors.index.json")
    if index:
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {name: str(Path(index).parent / shard) for name, shard in names.items()}
    single = find("model.safetensors")
    if not single:
        raise BaseModelError(f"{source} holds no safetensors checkpoint to read float weights from")
    with safe_open(single, "pt") as data:
        return dict.fromkeys(data.keys(), single)

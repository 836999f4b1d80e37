"""The sizes of a base's weights, read from its checkpoint one tensor at a time; no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from veneer.base.catalog import CATALOG, fetched
from veneer.base.load import HUB_ID
from veneer.base.original import checkpoint_files
from veneer.base.skeleton import skeleton
from veneer.errors import BaseModelError, WrongBaseError


def weight_norms(numbers: Mapping[str, int], base: str, revision: str | None = None) -> dict[str, float]:
    """‖W‖_F by module or parameter name, for those of `numbers` (name → how many W has) that the checkpoint holds whole
    and as floats.

    `base` is a directory, or a name of the catalogue or the hub that was fetched before. Raises `BaseModelError` (not
    here, no safetensors) and `WrongBaseError` (nothing fits).
    """
    from safetensors import safe_open

    files, norms = _files(base, revision), {}
    keys = _keys_by_name(base, files, revision)
    for name, left in numbers.items():
        own = next((keys[k] for k in (f"{name}.weight", f"{name}.in_proj_weight", name) if k in keys), [])
        square = 0.0
        for key in own:
            with safe_open(files[key], "pt") as data:
                weight = data.get_tensor(key)
            if weight.is_floating_point() and weight.element_size() > 1:
                square += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
                left -= weight.numel()
        if square and left == 0:
            norms[name] = square**0.5
    if not norms:
        raise WrongBaseError(
            f"{base} holds none of the weights that the adapter changes, in their shapes and as floats"
        )
    return norms


def _files(base: str, revision: str | None) -> dict[str, str]:
    """Tensor name → file, of what is on this machine."""
    place = fetched(base) if base in CATALOG else base
    if place is None:
        raise BaseModelError(f"{base} is not fetched yet: any command that loads it does that")
    if not (Path(place).is_dir() or HUB_ID.fullmatch(base)):
        raise BaseModelError(f"{base}: no such directory")
    try:
        return checkpoint_files(str(place), revision)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{base}: cannot read its weights: {' '.join(str(error).split())[:200]}") from None


def _keys_by_name(base: str, files: Mapping[str, str], revision: str | None) -> dict[str, list[str]]:
    """A model's parameter → the tensors of its checkpoint that become it: of another name, without the prefix of the
    body, or one for each expert, as transformers renames and fuses them while it loads."""
    same = {key: [key] for key in files}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        model = skeleton(base, revision=revision)
        changes = get_model_conversion_mapping(model)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        body, parameters = model.base_model_prefix, model.state_dict()
        found: dict[str, list[str]] = {}
        for key in files:
            name = rename_source_key(key, renamings, converters, body, parameters)[0]
            found.setdefault(name, []).append(key)
        return same | found
    except (ImportError, TypeError, BaseModelError):  # another transformers, or no configuration: the names as they are
        return same

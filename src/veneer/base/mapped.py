"""A model whose weights are views of its checkpoint's files: all of its structure, and no memory until it is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.base.checkpoint import FLOATS, Checkpoint
from veneer.base.load import BaseInfo
from veneer.base.quiet import quiet_transformers
from veneer.errors import BaseModelError


def map_model(checkpoint: Checkpoint, name: str | Path) -> tuple[Any, dict[str, str]]:
    """(causal language model, parameter name → tensor's name in the checkpoint).

    A parameter whose tensor the checkpoint holds in another form (the experts of a mixture, one by one) stays on the
    meta device, and so do all buffers: the model is for looking at, not for running. Raises `BaseModelError`.
    """
    model = empty_model(checkpoint.folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keys: dict[str, str] = {}
    for key, (parameter, whole) in stored_names(model, checkpoint.where).items():
        if whole and parameter in parameters and parameter not in keys:
            entry = checkpoint.entry(key)
            if entry.shape == tuple(parameters[parameter].shape) and entry.dtype in FLOATS:
                keys[parameter] = key
    made: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for path, parameter in parameters.items():
        if path in keys:
            tensor = checkpoint.tensor(keys[path])
            twins = made.setdefault(id(parameter), [])
            same = next((new for other, new in twins if torch.equal(tensor, new)), None)
            new = nn.Parameter(tensor, requires_grad=False) if same is None else same
            twins.append((path, new))
            _put(model, path, new)
    for path, parameter in parameters.items():
        if path not in keys and id(parameter) in made:  # a tied weight stands once in the checkpoint
            _put(model, path, made[id(parameter)][0][1])
    model.eval()
    model.veneer_base = BaseInfo(str(name), str(checkpoint.folder))
    return model, keys


def empty_model(folder: Path) -> Any:
    """The causal language model of a directory's config, without weights. Raises `BaseModelError`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            return AutoModelForCausalLM.from_config(config).requires_grad_(False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise BaseModelError(f"{folder}: cannot make the model: {' '.join(str(error).split())[:300]}") from None


def stored_names(model: Any, keys: Any) -> dict[str, tuple[str, bool]]:
    """Tensor name in a checkpoint → (the model's name for it, whether the model holds that very tensor).

    transformers renames some tensors as it loads them, and makes others of several.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    changes = get_model_conversion_mapping(model) or []
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    state = dict(model.state_dict(keep_vars=True))
    found = {}
    for key in keys:
        new, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        found[key] = new, pattern is None
    return found


def _put(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = path.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter

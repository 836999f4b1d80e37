"""Merge an adapter into a checkpoint tensor by tensor: W + ΔW in float32 a few rows at a time, rounded once.

Peak memory is a block of rows and the adapter, whatever the model's size. The files are written beside their final place,
each under a temporary name until it is whole; a merge that was cut short goes on with the files that it had finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.adapter.layers import plain
from veneer.adapter.targets import output_head
from veneer.base.checkpoint import (
    CODES,
    DTYPES,
    FLOATS,
    INDEX,
    Checkpoint,
    header_of,
    open_checkpoint,
    write_tensors,
)
from veneer.base.mapped import map_model
from veneer.base.quant import stored_method
from veneer.errors import AdapterFormatError, BaseModelError, ConfigError, RunError
from veneer.files import write_text
from veneer.formats.changes import Change, as_matrices, by_place, changes_of, merged_blocks, reference_row
from veneer.formats.peft import CONFIG, TENSORS, check_base, new_tokens_of, put_on, read_config, read_tensors
from veneer.formats.peft_tensors import resolve_paths, split

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
NOT_COPIED = ("*.index.json", "adapter_config.json", "veneer*.json", "complete.json")
PLAN = "plan.json"
SAMPLES = 24
"""Tensors of a file that are checked by a row."""


class NotStreamable(Exception):
    """Why a merge must go through memory; not an error of the user's."""


@dataclass
class RoundingError:
    """Mean |written − float32| over all merged elements, beside that of rounding to nearest."""

    count: int = 0
    nearest: float = 0.0
    stochastic: float = 0.0

    def add(self, exact: Tensor, written: Tensor, dtype: torch.dtype) -> None:
        self.count += exact.numel()
        self.nearest += float((exact.to(dtype).float() - exact).abs().sum(dtype=torch.float64))
        self.stochastic += float((written.float() - exact).abs().sum(dtype=torch.float64))

    def means(self) -> tuple[float, float]:
        """(to nearest, stochastic)."""
        return self.nearest / max(1, self.count), self.stochastic / max(1, self.count)


@dataclass
class MergePlan:
    """All that a merge will write: by file, the tensors in order with the dtype and shape to write, and their changes.

    `source` names the tensor of the checkpoint that a written one starts from.
    """

    checkpoint: Checkpoint
    entries: dict[str, dict[str, tuple[str, tuple[int, ...]]]]
    changes: dict[str, Change]
    source: dict[str, str]
    untied: bool
    dtype: torch.dtype | None = None
    seed: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)


def plan_merge(
    base: str | Path,
    folder: Path,
    adapter: Path,
    *,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    force: bool = False,
) -> MergePlan:
    """Find out what a merge of `adapter` into the checkpoint in `folder` changes; reads no weight but samples.

    Raises `NotStreamable`, and what `load_adapter` raises.
    """
    if stored_method(str(folder)):
        raise BaseModelError(f"{base} is stored quantised: name the float model that it was made from")
    fields, tensors = read_config(adapter), read_tensors(adapter)
    if new_tokens_of(adapter):
        raise NotStreamable("the adapter brings new tokens, which change the base's vocabulary")
    checkpoint = open_checkpoint(folder)
    model, keys = map_model(checkpoint, base)
    check_base(model, adapter, force)
    fields, tensors, magnitudes = _without_magnitudes(fields, tensors, adapter)
    bank = put_on(model, fields, tensors, name="default", trainable=False, source=adapter)
    magnitudes = _magnitudes_by_target(magnitudes, bank.layers, adapter)
    changes = changes_of(model, "default", magnitudes)
    checkpoint.forget()
    plan = _plan(checkpoint, model, keys, changes, dtype)
    plan.dtype, plan.seed = dtype, seed
    plan.identity = _identity(checkpoint, adapter, dtype, seed)
    return plan


def _without_magnitudes(
    fields: dict[str, Any], tensors: dict[str, Tensor], source: Path
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """DoRA's magnitudes apart: putting a DoRA adapter on a model would read every weight for norms that it then loses."""
    if not fields.get("use_dora"):
        return fields, tensors, {}
    mark = ".lora_magnitude_vector"
    found = {key.removesuffix(".weight").removesuffix(mark): v for key, v in tensors.items() if mark in key}
    for path, value in found.items():
        if not value.isfinite().all():
            raise AdapterFormatError(f"{source}: {path}{mark} holds NaN or infinite values")
    rest = {key: value for key, value in tensors.items() if mark not in key}
    return fields | {"use_dora": False}, rest, found


def _magnitudes_by_target(found: dict[str, Tensor], layers: dict[str, Any], source: Path) -> dict[str, Tensor]:
    if not found:
        return {}
    found = resolve_paths(found, [])
    for path, layer in layers.items():
        if path not in found or found[path].numel() != layer.d_out:
            raise AdapterFormatError(f"{source}: {path} lacks a lora_magnitude_vector of {layer.d_out} values")
    return found


def _plan(
    checkpoint: Checkpoint, model: Any, keys: dict[str, str], changes: dict[str, Change], dtype: torch.dtype | None
) -> MergePlan:
    def code(stored: str) -> str:
        return CODES[dtype] if dtype is not None and stored in FLOATS else stored

    entries = {
        name: {key: (code(e.dtype), e.shape) for key, e in file.entries.items()}
        for name, file in checkpoint.files.items()
    }
    by_key: dict[str, Change] = {}
    source: dict[str, str] = {}
    untied = False
    embedding = plain(model.get_input_embeddings()).weight
    head = output_head(model)
    for names in by_place(model).values():
        changed = {n: changes[n] for n in names if n in changes}
        stored = [n for n in names if n in keys]
        if not changed:
            continue
        if not stored:
            raise NotStreamable(f"the checkpoint holds {next(iter(changed))} in another form")
        alike = len(changed) == len(names) and all(c is changed[names[0]] or c == changed[names[0]] for c in changed.values())
        if alike:
            by_key |= {keys[n]: changed[n] for n in stored}
            continue
        if head is None or {id(model.get_parameter(n)) for n in ()} or not _is_pair(model, names, embedding, head):
            raise NotStreamable(f"{', '.join(names)} share one weight and change differently")
        untied = True
        for name in names:
            key = keys.get(name, name)
            if name not in keys:
                near = keys[stored[0]]
                entries[checkpoint.where[near]][key] = entries[checkpoint.where[near]][near]
                source[key] = near
            if name in changed:
                by_key[key] = changed[name]
    return MergePlan(checkpoint, entries, by_key, source, untied)

"""What a merge will write, file by file, found and checked before a weight is read or written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter.layers import plain
from veneer.adapter.targets import base_parameters, output_head
from veneer.base.checkpoint import CODES, DTYPES, FLOATS, Checkpoint, open_checkpoint
from veneer.base.mapped import map_model
from veneer.base.quant import stored_method
from veneer.errors import AdapterFormatError, BaseModelError
from veneer.formats.changes import Change, by_place, changes_of
from veneer.formats.peft import (
    CONFIG,
    TENSORS,
    check_base,
    check_values,
    new_tokens_of,
    put_on,
    read_config,
    read_tensors,
)
from veneer.formats.peft_tensors import resolve_paths
from veneer.version import __version__


class NotStreamable(Exception):
    """Why a merge must go through memory; not an error of the user's."""


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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to write."""
        every = [entry for entries in self.entries.values() for entry in entries.values()]
        return sum(torch.Size(shape).numel() * DTYPES[code].itemsize for code, shape in every)


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
    with one_thread():
        bank = put_on(model, fields, tensors, name="default", trainable=False, source=adapter)
        if bank.buffers("default"):
            raise NotStreamable("the adapter brings whole modules with buffers")
        bank.activate(None)  # whole modules and biases go back to being the base's own
        magnitudes = _magnitudes_by_target(magnitudes, bank.layers, adapter)
        changes = changes_of(model, "default", magnitudes)
    checkpoint.forget()
    plan = _plan(checkpoint, model, keys, changes, dtype)
    plan.dtype, plan.seed = dtype, seed
    plan.identity = _identity(checkpoint, adapter, dtype, seed)
    return plan


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one core, for many small operations: its threads wait for each other longer than these take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _without_magnitudes(
    fields: dict[str, Any], tensors: dict[str, Tensor], source: Path
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor] | None]:
    """DoRA's magnitudes apart (None: no DoRA): putting a DoRA adapter on a model would read every weight for norms that it
    then loses."""
    if not fields.get("use_dora"):
        return fields, tensors, None
    mark = ".lora_magnitude_vector"
    found = {key.removesuffix(".weight").removesuffix(mark): v for key, v in tensors.items() if mark in key}
    for path, value in found.items():
        check_values(value, path + mark, source)
    rest = {key: value for key, value in tensors.items() if mark not in key}
    return fields | {"use_dora": False}, rest, found


def _magnitudes_by_target(found: dict[str, Tensor] | None, layers: dict[str, Any], source: Path) -> dict[str, Tensor]:
    if found is None:
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

    files = checkpoint.files.items()
    entries = {name: {key: (code(e.dtype), e.shape) for key, e in file.entries.items()} for name, file in files}
    plan = MergePlan(checkpoint, entries, {}, {}, untied=False)
    places = by_place(model).values()
    lost = sorted(changes.keys() - {name for names in places for name in names})
    if lost:
        raise BaseModelError(
            f"the adapter brings {len(lost)} biases (lora_bias) for modules that have none in this architecture, first "
            f"{lost[0]}: a merged checkpoint would lose them; use base and adapter unmerged"
        )
    pair = {id(part.weight) for part in map(plain, (model.get_input_embeddings(), output_head(model))) if part}
    for names in places:
        changed = {n: changes[n] for n in names if n in changes}
        stored = [n for n in names if n in keys]
        if changed and not stored:
            raise NotStreamable(f"the checkpoint holds {next(iter(changed))} in another form than the model")
        if len(changed) == len(names) and len({id(c) for c in changed.values()}) == 1:
            plan.changes |= {keys[n]: changed[n] for n in stored}
        elif changed:
            if len(names) != 2 or id(base_parameters(model)[names[0]]) not in pair:
                raise NotStreamable(f"{', '.join(names)} share one weight and change differently")
            _untie(plan, names, keys, keys[stored[0]], changed)
    return plan


def _untie(plan: MergePlan, names: list[str], keys: dict[str, str], near: str, changed: dict[str, Change]) -> None:
    """Give head and embedding, one of which changes, a tensor each; `near` is the one that both have now."""
    plan.untied = True
    for name in names:
        key = keys.get(name, name)
        if name not in keys:
            entries = plan.entries[plan.checkpoint.where[near]]
            entries[key], plan.source[key] = entries[near], near
        if name in changed:
            plan.changes[key] = changed[name]


def _identity(checkpoint: Checkpoint, adapter: Path, dtype: torch.dtype | None, seed: int | None) -> dict[str, Any]:
    """What a merge that was cut short must share with one that goes on with it."""
    stats = {name: (file.path.stat().st_size, file.path.stat().st_mtime_ns) for name, file in checkpoint.files.items()}
    digest = hashlib.sha256()
    for name in (CONFIG, TENSORS):
        digest.update((adapter / name).read_bytes())
    return {
        "veneer": __version__,
        "base": {name: list(stat) for name, stat in stats.items()},
        "adapter": digest.hexdigest(),
        "dtype": str(dtype),
        "seed": seed,
    }

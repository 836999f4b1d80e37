"""Checkpoints: all that a run needs to go on bit for bit, written atomically, with no pickle."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.adapter.attach import get_bank
from veneer.errors import AdapterFormatError, RunError
from veneer.files import new_directory, remove_leftovers
from veneer.formats.peft import read_tensors, save_adapter
from veneer.formats.peft_tensors import PREFIX, adapter_tensors, assign
from veneer.training.adalora import AdaLora
from veneer.training.flat import FlatOptimizer

STATE, MOMENTS, ADALORA = "state.json", "optimizer.safetensors", "adalora.safetensors"


@dataclass
class Progress:
    """Where a run stands after `step` optimiser steps. Data order, dropout and schedule follow from `step`."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    examples: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0
    stopped_early: bool = False


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


@dataclass
class Trained:
    """What a checkpoint holds besides its `Progress`: the adapter `name` of a model and the state of its optimiser."""

    model: nn.Module
    optimizer: FlatOptimizer
    adalora: AdaLora | None = None
    name: str = "default"


def save_checkpoint(run: Path, trained: Trained, state: Progress, keep: int) -> Path:
    """Write checkpoints/step-N in one step, then drop the oldest beyond `keep`. Raises `RunError` (disk)."""
    path = checkpoint_path(run, state.step)
    with new_directory(path) as folder:
        save_adapter(trained.model, folder / "adapter", name=trained.name)
        save_file(trained.optimizer.state(), folder / MOMENTS)
        if trained.adalora is not None:
            save_file(trained.adalora.state(), folder / ADALORA)
        (folder / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_checkpoint(path: Path, trained: Trained) -> Progress:
    """Put a checkpoint's weights and moments into a model that has the adapter attached; `RunError` if damaged."""
    try:
        state = Progress(**json.loads((path / STATE).read_text(encoding="utf-8")))
        tensors, moments = read_tensors(path / "adapter"), load_file(path / MOMENTS)
        ranks = load_file(path / ADALORA) if trained.adalora is not None else {}
    except (OSError, ValueError, TypeError, SafetensorError, AdapterFormatError) as error:
        raise RunError(f"checkpoint {path} is damaged: {error}") from None
    fill_adapter(trained.model, tensors, path, trained.name)
    if trained.adalora is not None:
        trained.adalora.load_state(ranks)
    try:
        trained.optimizer.load_state(moments)
    except (KeyError, RuntimeError) as error:
        raise RunError(f"checkpoint {path} holds another optimiser's state: {error}") from None
    return state


def saved_rows(run: Path) -> dict[str, int] | None:
    """Rows of lora_A by module in the newest sound checkpoint; None without one."""
    for path in reversed(checkpoints(run)):
        try:
            tensors = read_tensors(path / "adapter")
        except AdapterFormatError:
            continue
        end = ".lora_A.weight"
        return {key.removesuffix(end): len(value) for key, value in tensors.items() if key.endswith(end)}
    return None


def fill_adapter(
    model: nn.Module, tensors: dict[str, torch.Tensor], path: Path, name: str | None = None
) -> dict[str, nn.Parameter]:
    """Copy saved tensors into the attached adapter (the first, if not named); its parameters by name. `RunError` if
    they do not fit."""
    bank = get_bank(model)
    name = name or bank.names[0]
    own = {key.removeprefix(PREFIX): value.shape for key, value in adapter_tensors(bank, name).items()}
    if own != {key: value.shape for key, value in tensors.items() if key in own}:
        raise RunError(f"checkpoint {path} does not hold this run's adapter: its tensors are others")
    assign(bank, name, tensors)
    return bank.parameters(name)


def tidy(run: Path) -> None:
    """Remove what a killed run left half-written."""
    for directory in (run, run / "checkpoints"):
        if directory.is_dir():
            remove_leftovers(directory)

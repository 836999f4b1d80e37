"""Merge an adapter into a checkpoint file by file: W + ΔW in float32 a few rows at a time, rounded once.

Peak memory is a block of rows and the adapter, whatever the model's size. The files are written beside their final place;
a merge that was cut short goes on with the files that it had finished.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock, Timeout

from veneer.adapter.attach import get_bank
from veneer.base.checkpoint import find_checkpoint
from veneer.base.load import load_base, pick_device, pick_dtype
from veneer.errors import BaseModelError, ConfigError, RunError
from veneer.files import writing
from veneer.formats.merge_plan import MergePlan, NotStreamable, plan_merge
from veneer.formats.merge_write import PLAN, RoundingError, check_file, write_merge
from veneer.formats.peft import load_adapter
from veneer.formats.verify import EXACT_FLOAT32, PROMPTS, LogitError, logit_error, logits

EXACT_16 = 0.05
"""Largest logit error over the largest logit that rounding all weights to 16 bits explains; 0.005 on a trained model of
135 M parameters, and 0.016 with stochastic rounding, but single tokens of small models reach 0.03."""


@dataclass(frozen=True)
class CheckpointMerge:
    """What `merge_checkpoint` wrote and how it was verified.

    `rows` sampled rows agreed with the formula. `logits` compares the written model with base + adapter, both read anew,
    and `effect` the base alone with it; where there are none, `why` says why. `rounding` holds the mean errors of stochastic
    rounding.
    """

    path: Path
    files: int
    reused: int
    tensors: int
    untied: bool
    logits: LogitError | None = None
    effect: LogitError | None = None
    rows: int = 0
    why: str = ""
    rounding: RoundingError | None = None


def merge_checkpoint(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    dtype: Any = "auto",
    seed: int | None = None,
    device: str = "auto",
    force: bool = False,
    verify: bool = True,
    prompts: Sequence[str] = PROMPTS,
    say: Callable[[str], None] = lambda text: None,
) -> CheckpointMerge:
    """Merge an adapter into a safetensors base and write a model directory like the base's, in little memory.

    dtype "auto" keeps the base's; `seed` turns on stochastic rounding to bfloat16. The result appears at `out` once it is
    whole and verified: by sampled rows, and by the logits of `prompts` on `device` where the model fits into memory. Raises
    `NotStreamable` (take `merge_into_float`), `BaseModelError` (not verified: nothing is written), `ConfigError`,
    `RunError` (disk) and what loading raises.
    """
    adapter, out = Path(adapter), Path(out)
    place, chosen = pick_device(device), None if dtype == "auto" else pick_dtype(dtype, "cpu")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: choose another place")
    folder = find_checkpoint(base)
    if folder is None:
        raise NotStreamable("the base is no safetensors checkpoint")
    plan = plan_merge(base, folder, adapter, dtype=chosen, seed=seed, force=force)
    _check_rounding(plan)
    partial = out.with_name(f".{out.name}.partial")
    with writing(out):
        partial.parent.mkdir(parents=True, exist_ok=True)
    _check_room(plan, partial)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        with lock.acquire(timeout=0):
            rounding, reused = write_merge(plan, partial, say)
            found = _verify(plan, adapter, partial, place, force, prompts, say) if verify else {"why": "not asked for"}
            if out.exists():
                out.rmdir()
            os.replace(partial, out)
            (out / PLAN).unlink()
            Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise RunError(f"another merge is writing {out}: wait for it or choose another place") from None
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}; the same command goes on from here") from None
    rounding = rounding if seed is not None else None
    return CheckpointMerge(out, len(plan.entries), reused, len(plan.changes), plan.untied, rounding=rounding, **found)


def _check_rounding(plan: MergePlan) -> None:
    if plan.seed is None:
        return
    code = next((e[key][0] for e in plan.entries.values() for key in plan.changes if key in e), "BF16")
    if code != "BF16":
        raise ConfigError(f"stochastic rounding is for bfloat16, and this merge writes {code}: add --dtype bfloat16")


def _check_room(plan: MergePlan, partial: Path) -> None:
    there = sum(file.stat().st_size for file in partial.glob("*.safetensors")) if partial.exists() else 0
    needed = plan.nbytes - there
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise RunError(
            f"the merged model takes {needed / 1e9:.1f} GB more and {partial.parent} has {free / 1e9:.1f} GB free"
        )


def _verify(
    plan: MergePlan,
    adapter: Path,
    partial: Path,
    device: str,
    force: bool,
    prompts: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compare what was written with base + adapter; on failure remove it and raise `BaseModelError`."""
    checked = [check_file(plan, name, partial / name) for name in plan.entries]
    wrong = next((problem for _, problem in checked if problem), None)
    dtype, why = _fitting_dtype(plan, device)
    found = {"rows": sum(rows for rows, _ in checked), "why": why}
    if dtype is not None and not wrong:
        say("verifying: logits of base + adapter, and of what was written")
        options = {"device": device, "dtype": dtype}
        model, tokenizer = load_base(plan.checkpoint.folder, **options)
        load_adapter(model, adapter, force=force, trainable=False)
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        truth = logits(model, ids)
        with get_bank(model).disabled():
            alone = logits(model, ids)
        del model
        model, _ = load_base(partial, **options)
        error = logit_error(logits(model, ids), truth)
        found |= {"logits": error, "effect": logit_error(alone, truth)}
        limit = _tolerance(plan)
        bad = error.max > limit * max(float(z.abs().max()) for z in truth) or error.max != error.max
        wrong = f"{error}, tolerance {limit:g} of the largest logit" if bad else None
    if wrong:
        shutil.rmtree(partial, ignore_errors=True)
        raise BaseModelError(f"the merged model is not the base with its adapter ({wrong}): nothing was written")
    return found


def _tolerance(plan: MergePlan) -> float:
    """Largest logit error over the largest logit that passes, by the dtype of what changed."""
    codes = {entries[key][0] for entries in plan.entries.values() for key in plan.changes if key in entries}
    if codes <= {"F32", "F64"}:
        return EXACT_FLOAT32
    return EXACT_16 if plan.seed is None else 2 * EXACT_16


def _fitting_dtype(plan: MergePlan, device: str) -> tuple[torch.dtype | None, str]:
    """The dtype to compare logits in: float32 if that fits into memory, else the written one; (None, why) if neither."""
    names = {file.name for file in plan.checkpoint.folder.iterdir()}
    if not any(name.startswith("token") or name.startswith("vocab") or name.endswith(".model") for name in names):
        return None, "the base has no tokenizer"
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(torch.device(device))[0]
    else:
        free = psutil.virtual_memory().available
    elements = sum(torch.Size(shape).numel() for e in plan.entries.values() for _, shape in e.values())
    for dtype in (torch.float32, plan.dtype or torch.bfloat16):
        if elements * dtype.itemsize * 1.2 + 5e8 < free:
            return dtype, ""
    return None, f"the model does not fit into the {free / 1e9:.1f} GB of memory that are free"


__all__ = ["CheckpointMerge", "NotStreamable", "merge_checkpoint"]

"""Compare what a model with its adapter computes with what came of writing it down: the last step of every conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.attach import detach, get_bank
from veneer.base.load import load_base
from veneer.errors import BaseModelError
from veneer.formats.peft import load_adapter

PROMPTS = (
    "The capital of France is",
    "Turn the message into JSON: my name is Anna, I live in Bremen and I owe 12.50 since March.",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a fox who",
)
EXACT = 0.02
"""Largest logit error of the exact route over the largest logit; float32 gives about 1e-6, bfloat16 about 1e-2."""
EXACT_FLOAT32 = 1e-4


@dataclass(frozen=True)
class LogitError:
    """Differences of the logits of two models over all positions of a few prompts.

    `top1` is the share of positions at which both find the same token likeliest.
    """

    max: float
    mean: float
    top1: float

    def __str__(self) -> str:
        return f"logit error max {self.max:.2g}, mean {self.mean:.2g}, same top token {self.top1:.1%}"


@dataclass(frozen=True)
class Verified:
    """The logit error of a result reloaded from disk, and what the adapter itself does to the logits."""

    error: LogitError
    effect: LogitError

    def __str__(self) -> str:
        return f"{self.error} (the adapter itself: max {self.effect.max:.2g}, mean {self.effect.mean:.2g})"


def logit_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> LogitError:
    """Compare logits, one (T, V) tensor a prompt."""
    error = torch.cat([(a - b).abs().flatten() for a, b in zip(found, wanted, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(found, wanted, strict=True)])
    return LogitError(float(error.max()), float(error.mean()), float(same.float().mean()))


@torch.inference_mode()
def logits(model: nn.Module, ids: Sequence[list[int]]) -> list[Tensor]:
    """Logits (T, V), float32 on the CPU, of each prompt by itself."""
    return [model(input_ids=torch.tensor([row], device=model.device)).logits[0].float().cpu() for row in ids]


def allowed(wanted: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The largest logit error that the rounding of dtype explains."""
    return (EXACT_FLOAT32 if dtype == torch.float32 else EXACT) * max(float(z.abs().max()) for z in wanted)


def check(found: Sequence[Tensor], wanted: Sequence[Tensor], alone: Sequence[Tensor], dtype: torch.dtype) -> Verified:
    """Raise `BaseModelError` where `found` is not `wanted` up to the rounding of dtype; `alone` is the base's."""
    result = Verified(logit_error(found, wanted), logit_error(alone, wanted))
    limit = allowed(wanted, dtype)
    if not result.error.max <= limit:  # NaN fails too
        raise BaseModelError(f"the result is not the base with its adapter: {result}, allowed {limit:.2g}")
    return result


def verify_adapter(
    base: str | Path,
    adapter: str | Path,
    result: str | Path,
    *,
    force: bool = False,
    merged_as: torch.dtype | None = None,
    **options: Any,
) -> Verified:
    """Logits of base + adapter against those of base + `result`, an adapter; or, with `merged_as`, of `result` alone.

    `merged_as` is the dtype in which a merged model's weights are stored, whose rounding is allowed. `options` go to
    `load_base`. Raises `BaseModelError` where the logits differ, and what loading raises.
    """
    model, tokenizer = load_base(base, **options)
    load_adapter(model, adapter, force=force, trainable=False, tokenizer=tokenizer)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    wanted = logits(model, ids)
    with get_bank(model).disabled():
        alone = logits(model, ids)
    detach(model)
    if merged_as:
        model, _ = load_base(result, **options)
    else:
        load_adapter(model, result, force=force, trainable=False, tokenizer=tokenizer)
    exact = model.dtype == torch.float32 and merged_as in (None, torch.float32)
    return check(logits(model, ids), wanted, alone, torch.float32 if exact else torch.bfloat16)


def effect_of(base: str | Path, adapter: str | Path, *, force: bool = False, **options: Any) -> LogitError:
    """What an adapter does to the logits of its base; it must load, so its names and shapes are checked too."""
    model, tokenizer = load_base(base, **options)
    bank = load_adapter(model, adapter, force=force, trainable=False, tokenizer=tokenizer)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    found = logits(model, ids)
    with bank.disabled():
        return logit_error(found, logits(model, ids))

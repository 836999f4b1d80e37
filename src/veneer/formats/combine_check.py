"""Compare a combination, reloaded from disk on its base, with the stack of the adapters that it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.adapter.attach import detach
from veneer.base.load import load_base
from veneer.errors import BaseModelError
from veneer.formats.peft import load_adapter
from veneer.formats.verify import PROMPTS, LogitError, allowed, logit_error, logits


def check_on_base(
    base: str | Path,
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None,
    result: str | Path,
    *,
    exact: bool,
    force: bool = False,
    **options: Any,
) -> LogitError:
    """Logits of base + Σ w_i ΔW_i (the live stack) against base + `result`, on a few prompts.

    `options` go to `load_base`. With `exact` (method cat) a difference above rounding is a `BaseModelError`; other
    methods differ on purpose. Raises what loading raises.
    """
    model, tokenizer = load_base(base, **options)
    for i, path in enumerate(adapters):
        bank = load_adapter(model, path, name=str(i), force=force, trainable=False, tokenizer=tokenizer)
    bank.activate({str(i): float(w) for i, w in enumerate(weights or [1.0] * len(adapters))})
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    wanted = logits(model, ids)
    detach(model)
    load_adapter(model, result, force=force, trainable=False, tokenizer=tokenizer)
    error, limit = logit_error(logits(model, ids), wanted), allowed(wanted, model.dtype)
    if exact and not error.max <= limit:  # NaN fails too
        raise BaseModelError(f"{result} is not the sum of its adapters on {base}: {error}, allowed {limit:.2g}")
    return error

"""Compare a combination, reloaded from disk on its base, with the stack of the adapters that it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.adapter.attach import detach
from veneer.base.load import load_base
from veneer.errors import BaseModelError
from veneer.formats.merged import EXACT, PROMPTS, LogitError, logit_error
from veneer.formats.peft import load_adapter


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
    ids = [torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device) for prompt in PROMPTS]
    with torch.inference_mode():
        wanted = [model(input_ids=row).logits[0].float().cpu() for row in ids]
        detach(model)
        load_adapter(model, result, force=force, trainable=False, tokenizer=tokenizer)
        found = [model(input_ids=row).logits[0].float().cpu() for row in ids]
    error = logit_error(found, wanted)
    limit = (1e-4 if model.dtype == torch.float32 else EXACT) * max(float(z.abs().max()) for z in wanted)
    if exact and not error.max <= limit:  # NaN fails too
        raise BaseModelError(f"{result} is not the sum of its adapters on {base}: {error}, allowed {limit:.2g}")
    return error

"""Merge an adapter into its float base and say what that costs; a quantised base is never merged into silently."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from veneer.adapter.attach import biases_gained, get_bank, merge
from veneer.adapter.frozen import is_quantised, weight_of
from veneer.adapter.vocabulary import add_tokens
from veneer.base.load import load_base, pick_device, pick_dtype
from veneer.base.quant import check_quant, quantised_linear
from veneer.base.quiet import quiet_transformers
from veneer.errors import AdapterStateError, BaseModelError, ConfigError
from veneer.files import new_directory
from veneer.formats.peft import load_adapter, new_tokens_of
from veneer.formats.verify import EXACT, PROMPTS, LogitError, logit_error, logits


@dataclass(frozen=True)
class MergeReport:
    """What `merge_into_float` wrote and how near each route is to the model with its adapter beside it.

    `exact`: the float merge against float base + adapter. With re-quantising, against the quantised base + adapter:
    `requantised` is what was written, `naive` what adding ΔW to the quantised weights and rounding again would give, and
    `effect` is the quantised base alone: a route whose error is as large has lost the adapter. `to_float` holds the
    errors of "unmerged" (quantised base + adapter), "requantised" and "naive" against float base + adapter.
    """

    path: Path
    quant: str | None
    exact: LogitError
    requantised: LogitError | None = None
    naive: LogitError | None = None
    effect: LogitError | None = None
    to_float: dict[str, LogitError] = field(default_factory=dict)


def merge_into_float(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    requantise: str | None = None,
    *,
    device: str = "auto",
    dtype: Any = "auto",
    force: bool = False,
    prompts: Sequence[str] = PROMPTS,
) -> MergeReport:
    """Merge an adapter into the original float weights of `base` and write a transformers model with its tokenizer.

    `requantise` (nf4, fp4, int8, int8-torchao, int4-torchao) writes the merged model quantised. Works in memory: it
    holds the model once, or with `requantise` twice. Raises `BaseModelError` (the base is stored quantised, or the
    merged model's logits differ from those of base + adapter), `ConfigError`, `RunError` (disk) and what loading raises.
    """
    out, place = Path(out), pick_device(device)
    requantise = check_quant(requantise, place, pick_dtype(dtype, place))
    if requantise == "hqq":
        raise ConfigError("transformers cannot store hqq: merge without it and load the result with quant hqq")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: choose another place")
    options = {"device": device, "dtype": dtype}
    model, tokenizer = load_base(base, **options)
    if any(is_quantised(module) for module in model.modules()):
        raise BaseModelError(f"{base} is stored quantised: name the float model that it was made from")
    bank = load_adapter(model, adapter, force=force, trainable=False, tokenizer=tokenizer)
    if gained := biases_gained(bank):
        raise BaseModelError(
            f"{adapter} brings biases (lora_bias) for layers that have none in {type(model).__name__}, first "
            f"{gained[0]}: a merged checkpoint would lose them; use base and adapter unmerged"
        )
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    truth = logits(model, ids)
    with new_directory(out) as folder:
        _save(merge(model), tokenizer, folder)
        del model, bank
        model, _ = load_base(folder, **options)  # what the file holds is what counts
        exact = logit_error(logits(model, ids), truth)
        if not exact.max <= EXACT * max(float(z.abs().max()) for z in truth):
            raise BaseModelError(f"the merged model is not the base with its adapter ({exact}): nothing was written")
        if requantise:
            del model
            model, _ = load_base(folder, quant=requantise, **options)
            shutil.rmtree(folder)
            _save(model, tokenizer, folder)
    if requantise is None:
        return MergeReport(out, None, exact)
    found = {"requantised": logits(model, ids)}
    del model
    model, _ = load_base(base, quant=requantise, **options)
    if new_tokens := new_tokens_of(Path(adapter)):
        add_tokens(model, tokenizer, new_tokens)
    found["alone"] = logits(model, ids)
    load_adapter(model, adapter, force=force, trainable=False, tokenizer=tokenizer)
    found["unmerged"] = logits(model, ids)
    _merge_and_round(model, requantise)
    found["naive"] = logits(model, ids)
    near = {key: logit_error(found[key], found["unmerged"]) for key in ("requantised", "naive", "alone")}
    to_float = {key: logit_error(found[key], truth) for key in ("unmerged", "requantised", "naive")}
    return MergeReport(out, requantise, exact, near["requantised"], near["naive"], near["alone"], to_float)


def _merge_and_round(model: nn.Module, quant: str) -> None:
    """Quantise W_q + ΔW anew in every adapted layer and let no adapter act: for comparison only."""
    bank = get_bank(model)
    acting = bank.active
    for layer in bank.layers.values():
        base = layer.base_layer
        if not is_quantised(base):
            raise AdapterStateError(
                f"{type(base).__name__} is adapted and not quantised: no naive merge to compare with"
            )
        weight = weight_of(base)
        linear = nn.Linear(*weight.shape[::-1], bias=base.bias is not None, device="meta")
        total = weight.float() + sum(w * layer.delta(n) for n, w in acting.items() if n in layer.lora_A)
        linear.weight = nn.Parameter(total, requires_grad=False)
        linear.bias = base.bias
        layer.base_layer = quantised_linear(linear, quant, model.dtype, weight.device)
    bank.routing.stack = {}


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

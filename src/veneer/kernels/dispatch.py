"""The only chooser between a fast path and its plain twin.

`impl="auto"` takes the fast path where its conditions hold; "fast" insists on it (ValueError where it cannot run);
"reference" takes the twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from veneer.kernels import cross_entropy, grouped, lora, quantised, ranges, reference
from veneer.kernels.quantised import Dequantise

Impl = Literal["auto", "fast", "reference"]


def _use_fast(impl: Impl, possible: bool, why_not: str) -> bool:
    if impl == "fast" and not possible:
        raise ValueError(f"the fast path cannot run here: {why_not}")
    return impl != "reference" and possible


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Frozen linear plus one adapter; see `veneer.kernels.reference.lora_linear`."""
    fast = _use_fast(impl, _frozen(x, weight), NOT_FROZEN)
    return (lora if fast else reference).lora_linear(x, weight, bias, lora_A, lora_B, scaling)


def quantised_lora_linear(
    x: Tensor,
    dequantise: Dequantise,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Frozen quantised linear plus one adapter; see `veneer.kernels.reference.quantised_lora_linear`."""
    fast = _use_fast(impl, not _autocast(x), "autocast chooses dtypes")
    return (quantised if fast else reference).quantised_lora_linear(x, dequantise, bias, lora_A, lora_B, scaling)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Frozen linear plus one DoRA adapter; see `veneer.kernels.reference.dora_linear`. `magnitude` holds no zero."""
    fast = _use_fast(impl, _frozen(x, weight), NOT_FROZEN)
    return (lora if fast else reference).dora_linear(x, weight, bias, lora_A, lora_B, magnitude, norm, scaling)


def ranged_lora_linear(
    x: Tensor,
    weight: ranges.Weight,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    names: Sequence[str],
    where: ranges.Ranges,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Frozen linear plus the adapters `names`, each on its own range of the row's tokens; see
    `veneer.kernels.reference.ranged_lora_linear`. `weight` may be a function that dequantises it."""
    possible = not _autocast(x)
    if isinstance(weight, Tensor):
        possible = possible and not weight.requires_grad and x.dtype == weight.dtype
    if _use_fast(impl, possible, NOT_FROZEN):
        return ranges.ranged_lora_linear(x, weight, bias, lora_A, lora_B, scaling, names, where)
    bounds = [where.bounds[name] for name in names]
    return reference.ranged_lora_linear(x, weight, bias, lora_A, lora_B, scaling, bounds)


def grouped_lora(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """The adapters' updates, each row's own or their sum; see `veneer.kernels.reference.grouped_lora`."""
    fast = _use_fast(impl, rows is not None and not torch.compiler.is_compiling(), "every row has all adapters")
    return (grouped if fast else reference).grouped_lora(x, lora_A, lora_B, scaling, rows)


NOT_FROZEN = "the weight is trained, has another dtype than x, or autocast chooses dtypes"


def _frozen(x: Tensor, weight: Tensor) -> bool:
    """Whether a fused function may take the weight as a constant in x's dtype."""
    plain = torch.compiler.is_compiling()  # the compiler fuses the twin better, and picks what to keep
    return not (weight.requires_grad or plain) and x.dtype == weight.dtype and not _autocast(x)


def _autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # which knows no meta device


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: Literal["sum", "none"] = "sum",
    impl: Impl = "auto",
) -> Tensor:
    """Head and loss, summed or each position's; see `veneer.kernels.reference.linear_cross_entropy`."""
    possible = not weight.requires_grad and (bias is None or not bias.requires_grad) and hidden.dtype == weight.dtype
    fast = _use_fast(impl, possible, "the head is trained or has another dtype than the hidden states")
    module = cross_entropy if fast else reference
    options = {"softcap": softcap, "logit_scale": logit_scale, "reduction": reduction}
    return module.linear_cross_entropy(hidden, weight, bias, targets, **options)

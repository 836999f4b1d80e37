"""Plain PyTorch twins: the definition of every fast path, with the same signature.

Legend: B batch rows, T tokens, I input width, O output width, R rank, N supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """y[…,o] = Σ_i x[…,i] W[o,i] + bias[o] + s Σ_r (Σ_i x[…,i] A[r,i]) B[o,r]   (arXiv:2106.09685, eq. 3).

    x (…, I), weight (O, I), bias (O) or None, lora_A (R, I), lora_B (O, R). The factors are cast to x's dtype, which
    is the dtype of the result (…, O).
    """
    update = F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * update


def quantised_lora_linear(
    x: Tensor,
    dequantise: Callable[[torch.dtype], Tensor],
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """`lora_linear` of the weight that `dequantise(dtype)` gives, (O, I); it gets no gradient (arXiv:2305.14314, eq. 5)."""
    return lora_linear(x, dequantise(x.dtype).detach(), bias, lora_A, lora_B, scaling)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
) -> Tensor:
    """y[…,o] = c[o] (Σ_i x[…,i] W[o,i] + s Σ_r (x Aᵀ)[…,r] B[o,r]) + bias[o], c = m/norm (arXiv:2402.09353, eq. 5).

    Shapes as in `lora_linear`, magnitude m and norm (O); norm = ‖W + s B A‖ by rows is a constant (section 4.3).
    """
    c = (magnitude / norm).to(x.dtype)
    y = c * lora_linear(x, weight, None, lora_A, lora_B, scaling)
    return y if bias is None else y + bias


def grouped_lora(
    x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float], rows: Tensor | None = None
) -> Tensor:
    """The sum of the adapters' updates, or each row's own adapter's.

    x (B, …, I), lora_A[n] (R_n, I), lora_B[n] (O, R_n), ranks may differ. Without `rows`:
    Δ[b,…] = Σ_n s_n B_n A_n x[b,…]. With `rows` (B, int64): Δ[b,…] = s_n B_n A_n x[b,…] for n = rows[b], and exactly 0
    where rows[b] = -1. Returns (B, …, O) in x's dtype.
    """
    if rows is None:
        return sum(s * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) for a, b, s in zip(lora_A, lora_B, scaling))
    update = x.new_zeros(*x.shape[:-1], lora_B[0].shape[0])
    for n, (a, b, s) in enumerate(zip(lora_A, lora_B, scaling)):
        chosen = (rows == n).nonzero().squeeze(-1)
        if chosen.numel():
            part = s * F.linear(F.linear(x[chosen], a.to(x.dtype)), b.to(x.dtype))
            update = update.index_copy(0, chosen, part)
    return update


def ranged_lora_linear(
    x: Tensor,
    weight: Tensor | Callable[[torch.dtype], Tensor],
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    bounds: Sequence[tuple[int, int]],
) -> Tensor:
    """y[t,o] = Σ_i x[t,i] W[o,i] + bias[o] + s_n Σ_r (Σ_i x[t,i] A_n[r,i]) B_n[o,r] for t in [start_n, end_n).

    x (…, T, I) whose leading dimensions are 1, lora_A[n] (R_n, I), lora_B[n] (O, R_n); the ranges `bounds` do not
    overlap, and a token in none of them has the frozen linear alone. The result is (…, T, O) in x's dtype.
    """
    weight = weight if isinstance(weight, Tensor) else weight(x.dtype).detach()
    y, at = F.linear(x, weight, bias), torch.arange(x.shape[-2], device=x.device).unsqueeze(-1)
    for a, b, s, (start, end) in zip(lora_A, lora_B, scaling, bounds):
        update = s * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        y = y + torch.where((at >= start) & (at < end), update, torch.zeros_like(update))
    return y


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """Σ_n −log softmax(z[n])[targets[n]] with z = cap·tanh(c·(hidden Wᵀ + bias)/cap), or c·(hidden Wᵀ + bias).

    hidden (N, I), weight (V, I), bias (V) or None, targets (N) int64; below 0 they count for nothing. Returns the float32
    sum (not the mean), or with reduction "none" each position's part (N).
    """
    logits = F.linear(hidden, weight, bias).float() * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets.clamp_min(-1), ignore_index=-1, reduction=reduction)

"""LoRA's maths as pure functions (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaling(rank: int, alpha: float, rslora: bool = False) -> float:
    """s = alpha/rank, or alpha/√rank for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732, eq. 4)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def alpha_of(rank: int, scale: float, rslora: bool = False) -> float:
    """The alpha that gives a scaling at a rank: the inverse of `scaling`."""
    return scale * math.sqrt(rank) if rslora else scale * rank


def wide(tensor: Tensor) -> Tensor:
    """At least float32: what sums are made in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def delta(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """ΔW = s·B·A in float32: lora_A (rank, d_in), lora_B (d_out, rank) → (d_out, d_in)."""
    return scale * (wide(lora_B) @ wide(lora_A))


def dora_norm(weight: Tensor, squares: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of each row without the dense sum (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    ‖W[o] + s Σ_r B[o,r] A[r]‖² = ‖W[o]‖² + 2s Σ_r B[o,r] (A Wᵀ)[r,o] + s² Σ_r (B A Aᵀ)[o,r] B[o,r].
    weight (d_out, d_in) in any float dtype, squares ‖W[o]‖² (d_out) float32, lora_A (rank, d_in), lora_B (d_out, rank)
    → (d_out) float32. A product of rank·d_in·d_out: rank/T of one forward over T tokens.
    """
    a, b = wide(lora_A), wide(lora_B)
    cross = wide(weight @ lora_A.to(weight.dtype).t())
    total = squares + 2 * scale * (b * cross).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
    return total.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()

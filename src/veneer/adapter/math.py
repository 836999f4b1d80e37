"""LoRA's maths as pure functions (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math

from torch import Tensor


def scaling(rank: int, alpha: float, rslora: bool = False) -> float:
    """s = alpha/rank, or alpha/√rank for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732, eq. 4)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def delta(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """ΔW = s·B·A in float32: lora_A (rank, d_in), lora_B (d_out, rank) → (d_out, d_in)."""
    return scale * (lora_B.float() @ lora_A.float())


def lora_parameters(d_in: int, d_out: int, rank: int) -> int:
    """Parameters of A and B together: rank·(d_in + d_out)."""
    return rank * (d_in + d_out)

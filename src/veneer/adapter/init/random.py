"""Starts that need the shapes alone.

Each takes (rank, d_in, d_out, generator), returns float32 lora_A (rank, d_in) and lora_B (d_out, rank) on the CPU and
leaves ΔW = 0 (for "orthogonal" up to rounding).
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


def kaiming(rank: int, d_in: int, d_out: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """A ~ U(−1/√d_in, 1/√d_in), which is Kaiming's uniform with a = √5 as nn.Linear has it; B = 0."""
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator), torch.zeros(d_out, rank)


def gaussian(rank: int, d_in: int, d_out: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1/rank²), B = 0."""
    return torch.empty(rank, d_in).normal_(0, 1 / rank, generator=generator), torch.zeros(d_out, rank)


def orthogonal(rank: int, d_in: int, d_out: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """A and B both start non-zero, in orthogonal halves of one random rank-dimensional space, so B·A = 0.

    With Q (rank × rank) orthogonal: A = (Q_oddᵀ X)/10 and B = (Y Q_even)/10, X and Y Gaussian; Q_even Q_oddᵀ = 0. The
    rank is even.
    """
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    lora_A = q[0::2].t() @ torch.randn(rank // 2, d_in, generator=generator) / 10
    lora_B = torch.randn(d_out, rank // 2, generator=generator) @ q[1::2] / 10
    return lora_A.contiguous(), lora_B.contiguous()


def embedding(rank: int, vocab: int, dim: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """For a lookup table: A = 0 (rank, vocab), B ~ N(0, 1) (dim, rank), as PEFT and Microsoft's loralib start it."""
    return torch.zeros(rank, vocab), torch.empty(dim, rank).normal_(generator=generator)

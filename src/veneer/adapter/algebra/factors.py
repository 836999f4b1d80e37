"""Exact arithmetic on factors: sums, norms and best truncations of products B·A, never a d_out × d_in matrix.

Sizes: A (rank, d_in), B (d_out, rank). A pair is (A, B) and stands for the matrix B·A. Computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import AdapterStateError

Pair = tuple[Tensor, Tensor]
NEGLIGIBLE = 1e-12
"""Singular values below this share of the largest are rounding noise of float64."""


@dataclass(frozen=True)
class Term:
    """One adapter's part of a sum: weight · scaling · lora_B · lora_A, with lora_A (rank, d_in), lora_B (d_out, rank)."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    weight: float

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.lora_A.shape[0]

    def task(self) -> Pair:
        """ΔW = s·B·A without the weight, as a float64 pair."""
        return self.lora_A.double(), self.scaling * self.lora_B.double()


def total(terms: Sequence[Term]) -> Pair:
    """Σ w_i s_i B_i A_i as it stands, a pair of rank Σ r_i: A = rows [w_i s_i A_i], B = columns [B_i]."""
    lora_A = torch.cat([t.weight * t.scaling * t.lora_A.double() for t in terms])
    return lora_A, torch.cat([t.lora_B.double() for t in terms], dim=1)


def core(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Q_B (d_out, p), M (p, q), Q_A (d_in, q) with B·A = Q_B M Q_Aᵀ and orthonormal columns: the QR of both factors."""
    lora_A, lora_B = (f.double() for f in pair)
    left, r_b = torch.linalg.qr(lora_B)
    right, r_a = torch.linalg.qr(lora_A.t())
    return left, r_b @ r_a.t(), right


def svd(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of B·A from its factors: U (d_out, k), σ (k) falling, V (d_in, k). O((d_out + d_in)·rank²)."""
    left, middle, right = core(pair)
    u, s, vh = torch.linalg.svd(middle, full_matrices=False)
    return left @ u, s, right @ vh.t()


def norm(pair: Pair) -> float:
    """‖B·A‖_F."""
    return float(torch.linalg.vector_norm(core(pair)[1]))


def distance(one: Pair, other: Pair) -> float:
    """‖B₁A₁ − B₂A₂‖_F; right to float64's rounding of the larger, as nothing is squared."""
    (a1, b1), (a2, b2) = ([f.double() for f in pair] for pair in (one, other))
    return norm((torch.cat([a1, a2]), torch.cat([b1, -b2], dim=1)))


def from_svd(u: Tensor, s: Tensor, v: Tensor) -> Pair:
    """(A, B) = (√σ Vᵀ, U √σ): both factors of like size, which suits rounding and more training."""
    root = s.sqrt()
    return root[:, None] * v.t(), u * root


def truncate(pair: Pair, rank: int) -> Pair:
    """The best approximation of B·A of a rank (Eckart–Young); shorter where the dimensions are."""
    u, s, v = svd(pair)
    return from_svd(u[:, :rank], s[:rank], v[:, :rank])


def truncate_dense(matrix: Tensor, rank: int) -> Pair:
    """The best approximation of a matrix (d_out, d_in) of a rank, by the eigenvectors of its smaller Gram matrix.

    O(d_out·d_in·d + d³) with d = min(d_out, d_in), in float64; singular values below 1e-8 of the largest are noise.
    """
    matrix = matrix.double()
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    u = torch.linalg.eigh(wide @ wide.t()).eigenvectors.flip(1)[:, :rank]
    rows = u.t() @ wide
    root = torch.linalg.vector_norm(rows, dim=1).sqrt()
    rows = rows / torch.where(root == 0, torch.ones_like(root), root)[:, None]
    return (rows, u * root) if wide is matrix else ((u * root).t(), rows.t())


def linear(terms: Sequence[Term]) -> Pair:
    """A = Σ sign(w_i) √|w_i s_i| A_i, B = Σ √|w_i s_i| B_i, as PEFT's "linear".

    Not the sum: the product has the cross terms B_i A_j. Raises `AdapterStateError` where the ranks differ.
    """
    same_rank(terms)
    pairs = rooted(terms)
    return sum(a for a, _ in pairs), sum(b for _, b in pairs)


def rooted(terms: Sequence[Term]) -> list[Pair]:
    """(sign(w) √|w s| A, √|w s| B) of each term: w·s shared evenly, the sign on A."""
    found = []
    for t in terms:
        scale = t.weight * t.scaling
        root = math.sqrt(abs(scale))
        found.append((math.copysign(root, scale) * t.lora_A.double(), root * t.lora_B.double()))
    return found


def same_rank(terms: Sequence[Term]) -> None:
    """Raise `AdapterStateError` where factors cannot be added one to one."""
    ranks = {t.rank for t in terms}
    if len(ranks) > 1:
        raise AdapterStateError(
            f"ranks {', '.join(map(str, sorted(ranks)))} differ, and this adds A to A and B to B: "
            f"use cat or svd, or another space than factors"
        )


def independent(s: Tensor, share: float = NEGLIGIBLE) -> int:
    """How many of falling singular values are above a share of the largest."""
    return int((s > share * s[0]).sum()) if s.numel() and s[0] > 0 else 0

"""Common bases of several low-rank updates: small coordinates to merge in, without loss, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapter.algebra.factors import Pair, Term, independent

KNOTS_DROP = 1e-5
"""Singular values below this share of the largest are no direction of the updates (KnOTS)."""


@dataclass(frozen=True)
class Basis:
    """Coordinates of each update in a common basis, and `back` from merged coordinates to a pair (A, B)."""

    coordinates: list[Tensor]
    back: Callable[[Tensor], Pair]


def knots(terms: Sequence[Term]) -> Basis:
    """KnOTS (Stoica et al. 2024, arXiv:2410.19735, section 4): [ΔW_1 … ΔW_n] = U Σ [V_1 … V_n]ᵀ; coordinates Σ V_iᵀ.

    Each (R, d_in) with R ≤ Σ r_i. From factors: the stacked B are Q R, so that the SVD is that of the rows
    [R_1 s_1 A_1 … R_n s_n A_n] (Σ r_i, n·d_in) with U turned by Q.
    """
    tasks = [t.task() for t in terms]
    q, r = torch.linalg.qr(torch.cat([b for _, b in tasks], dim=1))
    parts = [r_i @ a for r_i, (a, _) in zip(r.split([t.rank for t in terms], dim=1), tasks)]
    _, upper = torch.linalg.qr(torch.cat(parts, dim=1).t())  # its Rᵀ has the left vectors of the wide matrix
    u, s, _ = torch.linalg.svd(upper.t())
    u = u[:, : independent(s, KNOTS_DROP)]
    return Basis([u.t() @ part for part in parts], lambda merged: (merged, q @ u))


def core_space(terms: Sequence[Term]) -> Basis:
    """Core Space (Panariello et al. 2025, arXiv:2509.17786): coordinates U_Bᵀ ΔW_i V_A, (q, p) with p, q ≤ Σ r_i.

    U_B and V_A are the left vectors of the stacked B and the right vectors of the stacked A, which span every update, so
    nothing is lost. √s_i goes to both factors.
    """
    roots = [abs(t.scaling) ** 0.5 for t in terms]
    stacked_A = torch.cat([root * t.lora_A.double() for root, t in zip(roots, terms)])
    stacked_B = torch.cat([root * t.lora_B.double() for root, t in zip(roots, terms)], dim=1)
    _, s_a, vh = torch.linalg.svd(stacked_A, full_matrices=False)
    u, s_b, _ = torch.linalg.svd(stacked_B, full_matrices=False)
    u, vh = u[:, : independent(s_b)], vh[: independent(s_a)]
    coordinates = [(u.t() @ b) @ (a @ vh.t()) for a, b in (t.task() for t in terms)]
    return Basis(coordinates, lambda merged: (merged @ vh, u))

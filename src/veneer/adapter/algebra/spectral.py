"""Methods on the singular vectors of the updates, from factors alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.adapter.algebra.factors import Pair, Term, from_svd, independent, svd, total


def iso_c(terms: Sequence[Term]) -> Pair:
    """Iso-C (Marczak et al. 2025, arXiv:2502.04959, algorithm 1): Σ w_i ΔW_i = U Σ Vᵀ becomes σ̄ U Vᵀ, σ̄ = mean of σ.

    The mean and the vectors are those of the sum's own rank (as in Core Space, arXiv:2509.17786), not of all
    min(d_out, d_in): the vectors of zeros are arbitrary.
    """
    u, s, v = svd(total(terms))
    k = independent(s)
    return from_svd(u[:, :k], s[:k].mean().expand(k) if k else s[:0], v[:, :k])


def tsv(terms: Sequence[Term]) -> Pair:
    """TSV-Merge (Gargiulo et al. 2024, arXiv:2412.00081, section 3.3): U⊥ Σ V⊥ᵀ.

    ΔW_i = U_i Σ_i V_iᵀ with at most min(d_out, d_in)/n vectors of each of the n updates; U = [U_1 … U_n] and V alike are
    replaced by the nearest matrices with orthonormal columns, so that the tasks do not interfere. Σ holds |w_i| Σ_i; the
    sign of w_i turns U_i.
    """
    d_out, d_in = terms[0].lora_B.shape[0], terms[0].lora_A.shape[1]
    acting = [t for t in terms if t.weight != 0]
    lefts, values, rights = [], [], []
    for t in acting:
        u, s, v = svd(t.task())
        k = min(independent(s), max(1, min(d_out, d_in) // len(acting)))
        lefts.append(u[:, :k] if t.weight > 0 else -u[:, :k])
        values.append(abs(t.weight) * s[:k])
        rights.append(v[:, :k])
    if not sum(s.numel() for s in values):
        return terms[0].lora_A.new_zeros(0, d_in).double(), terms[0].lora_B.new_zeros(d_out, 0).double()
    return from_svd(
        nearest_orthonormal(torch.cat(lefts, dim=1)), torch.cat(values), nearest_orthonormal(torch.cat(rights, dim=1))
    )


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """P Qᵀ of the SVD P D Qᵀ of a matrix (d, k): the orthonormal columns nearest to it (orthogonal Procrustes)."""
    p, _, qh = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qh

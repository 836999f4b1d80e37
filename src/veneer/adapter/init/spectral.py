"""Starts from a decomposition of the weight, of the weight seen through its inputs, or of its gradient.

Shapes: weight, gradient (d_out, d_in); covariance (d_in, d_in); lora_A (rank, d_in); lora_B (d_out, rank). All float32,
on one device. `scaling` is s in y = W x + s·B·A x. Where the base becomes W − s·B·A the function says so.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from veneer.errors import ConfigError


def low_rank_svd(
    matrix: Tensor, components: int, iterations: int, generator: Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k), Vh (k, n): the k largest singular triples, by subspace iteration from a random start.

    Halko, Martinsson & Tropp 2009 (arXiv:0909.4061), algorithm 4.4 and then 5.1. The start is drawn on the CPU, so that
    a seed means the same on every device.
    """
    start = torch.randn(matrix.shape[1], components, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ u, s, vh


def pissa(
    weight: Tensor, rank: int, scaling: float, iterations: int | None, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """Meng et al. 2024 (arXiv:2404.02948), eq. 2–4: s·B·A = the best rank-r part of W; the base becomes the rest.

    A = √(S_r/s) V_rᵀ, B = U_r √(S_r/s). `iterations` absent: exact SVD; else so many subspace iterations.
    """
    if iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = low_rank_svd(weight, rank, iterations, generator)
    return balanced(u[:, :rank], s[:rank] / scaling, vh[:rank])


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Büyükakyüz 2024 (arXiv:2406.01775), algorithm 1: W = Q·R, B = Q[:, :r], A = R[:r]; the base becomes W − s·B·A."""
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


def loftq(weight: Tensor, quantised: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Li et al. 2023 (arXiv:2310.08659), one iteration: B·A = the best rank-r part of (W − Q)/s; the base stays Q.

    The paper goes on to quantise W − s·B·A anew and to repeat. That changes the base, which then serves this one
    adapter only and is on no disk but the user's own; Veneer's base is the checkpoint as it is, so it stops here.
    """
    u, s, vh = torch.linalg.svd((weight - quantised) / scaling, full_matrices=False)
    return balanced(u[:, :rank], s[:rank], vh[:rank])


def corda(weight: Tensor, covariance: Tensor, rank: int, scaling: float, method: str) -> tuple[Tensor, Tensor]:
    """Yang et al. 2024 (arXiv:2406.05223): W·C = U S Vᵀ, hence W = U S (Vᵀ C⁻¹), cut to r of its terms.

    "ipm" takes the terms of the r largest singular values (what the inputs use most is trained), "kpm" of the r
    smallest (what they use most is kept). A = √(S/s) Vᵀ C⁻¹, B = U √(S/s); the base becomes W − s·B·A. C is first made
    invertible by a multiple of its mean diagonal, 0.01 and doubled until C·C⁻¹ is the identity to 0.05.
    """
    covariance, inverse = _invertible(covariance)
    u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    kept = slice(0, rank) if method == "ipm" else slice(len(s) - rank, len(s))
    return balanced(u[:, kept], s[kept] / scaling, vh[kept] @ inverse)


def _invertible(covariance: Tensor) -> tuple[Tensor, Tensor]:
    identity = torch.eye(len(covariance), device=covariance.device)
    damping, mean = 0.01, covariance.diagonal().mean()
    while damping < 1e6:
        damped = covariance + damping * mean * identity
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and torch.dist(damped @ inverse, identity) < 0.05:
            return damped, inverse
        damping *= 2
    raise ConfigError("the covariance of the inputs cannot be inverted: are they all zero, or not finite?")


def lora_ga(
    gradient: Tensor,
    weight: Tensor,
    rank: int,
    scaling: float,
    generator: Generator | None,
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
) -> tuple[Tensor, Tensor]:
    """Wang et al. 2024 (arXiv:2407.05000), in PEFT's form; the base becomes W − s·B·A.

    ∇W = U S Vᵀ. A = rows I of Vᵀ, B = columns J of U·S, with I the first r and J the second r ("ArB2r"), the other way
    round ("A2rBr"), odd and even ones ("ArBr"), or one random r of the first 2r for both ("random"). Then B is scaled
    by d_out^¼/√γ ("stable") or by S₁(W)/S_J₁ ("weight_svd"), both are divided by s ("gd_scale"), or neither ("unit").
    The paper has no S in B and scales A too; PEFT's form is followed, as that is what its users have. 2r is at most
    min(d_in, d_out).
    """
    u, s, vh = low_rank_svd(gradient, min(4 * rank, *gradient.shape), 4, generator)
    if direction == "random":
        rows = columns = torch.randperm(2 * rank, generator=generator)[:rank].to(s.device)
    else:
        first, second = torch.arange(rank), torch.arange(rank, 2 * rank)
        even, odd = torch.arange(0, 2 * rank, 2), torch.arange(1, 2 * rank, 2)
        rows, columns = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even)}[direction]
        rows, columns = rows.to(s.device), columns.to(s.device)
    lora_A, lora_B = vh[rows], u[:, columns] * s[columns]
    if scale == "stable":
        lora_B = lora_B * (weight.shape[0] ** 0.25 / gamma**0.5)
    elif scale == "weight_svd" and s[columns[0]] > 0:
        lora_B = lora_B * (low_rank_svd(weight, rank, 4, generator)[1][0] / s[columns[0]])
    elif scale == "gd_scale":
        lora_A, lora_B = lora_A / scaling, lora_B / scaling
    return lora_A, lora_B


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """A = √S Vᵀ and B = U √S, so that B·A = U S Vᵀ."""
    root = s.sqrt()
    return root[:, None] * vh, u * root

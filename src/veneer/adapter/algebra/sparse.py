"""Methods that choose single values of the task vectors τ_i: what to keep of each, and what to keep of their sum.

Each works on values of any shape: whole ΔW_i, factors, or coordinates in a common basis. τ_i is a tensor (…, columns).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.errors import ConfigError


def largest(task: Tensor, density: float) -> Tensor:
    """The ⌊density·n⌋ values of largest magnitude, at least one, zeros elsewhere (TIES' trim, magnitude pruning)."""
    return band(task, density, 0.0)


def band(task: Tensor, density: float, gamma: float) -> Tensor:
    """Breadcrumbs (Davari & Belilovsky 2023, arXiv:2312.06795, section 3): drop the ⌊γ·n⌋ largest magnitudes, keep the
    ⌊density·n⌋ that follow, drop the rest. At least one is kept: in a small common basis ⌊density·n⌋ may be 0."""
    if density >= 1 and gamma == 0:
        return task
    skip, keep = int(gamma * task.numel()), max(1, int(density * task.numel()))
    order = task.abs().flatten().topk(min(skip + keep, task.numel())).indices[skip:]
    mask = torch.zeros(task.numel(), dtype=torch.bool, device=task.device)
    mask[order] = True
    return task * mask.view_as(task)


def drop(task: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2023, arXiv:2311.03099, eq. 1): keep each value with probability density, divide by it."""
    if density >= 1:
        return task
    return task * random_mask(torch.full_like(task, density), generator) / density


def drop_small(task: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    """DELLA's MagPrune (Deep et al. 2024, arXiv:2406.11617, section 3.1).

    Within a row of n values the one of magnitude rank k (0: the smallest) is kept with probability
    (density − ε) + 2ε·k/(n − 1), and divided by it.
    """
    keep = keep_probability(task, density, epsilon)
    return task * random_mask(keep, generator) / keep


def check_epsilon(density: float, epsilon: float) -> None:
    """Raise `ConfigError` where DELLA's probabilities leave 0 to 1."""
    if epsilon < 0 or density - epsilon <= 0 or density + epsilon > 1:
        raise ConfigError(f"DELLA keeps density ± epsilon: {density} ± {epsilon} is not within 0 and 1")


def keep_probability(task: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA's probability of each value, (…, n), between density − ε and density + ε."""
    n = task.shape[-1]
    rank = task.abs().argsort(dim=-1).argsort(dim=-1).to(task.dtype)
    return density + epsilon * (2 * rank / (n - 1) - 1) if n > 1 else torch.full_like(task, density)


def random_mask(probability: Tensor, generator: torch.Generator) -> Tensor:
    """1 with the given probability, else 0. Drawn on the CPU, so that a seed means the same on every device."""
    drawn = torch.rand(probability.shape, generator=generator, dtype=torch.float64)
    return (drawn.to(probability.device) < probability).to(probability.dtype)


def weighted_sum(tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i τ_i."""
    return sum(w * task for w, task in zip(weights, tasks, strict=True))


def elect(tasks: Sequence[Tensor], weights: Sequence[float], like: str | None = None) -> Tensor:
    """TIES' elect and disjoint merge (Yadav et al. 2023, arXiv:2306.01708, algorithm 1).

    For each value, γ = sign Σ_i τ_i, and of the τ_i with that sign the mean. A sum of 0 elects +. The weights enter as
    None: the task vectors are w_i τ_i, in the election too, so a negative weight turns a vote; divided by their count.
    "peft": the election is without weights, w_i τ_i of those that agree divided by their count.
    "mergekit": the election is with weights, w_i τ_i of those that agree divided by the sum of their w_i.
    """
    votes = tasks if like == "peft" else [w * task for w, task in zip(weights, tasks, strict=True)]
    positive = sum(votes) >= 0
    value, share = torch.zeros_like(tasks[0]), torch.zeros_like(tasks[0])
    for task, vote, w in zip(tasks, votes, weights, strict=True):
        agrees = torch.where(positive, vote > 0, vote < 0)
        value += torch.where(agrees, w * task, 0)
        share += agrees.to(task.dtype) * (w if like == "mergekit" else 1.0)
    return value / torch.where(share == 0, torch.ones_like(share), share)

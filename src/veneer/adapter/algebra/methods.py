"""The table of methods, and one layer's combination by any of them: plan, validate, apply."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.adapter.algebra import bases, factors, sparse, spectral
from veneer.adapter.algebra.factors import Pair, Term
from veneer.errors import ConfigError

SPACES = ("full", "factors", "core", "knots")
"""Where a method that chooses single values works: on ΔW, on A and B apart, or on coordinates in a common basis."""

Sparsify = Callable[[Tensor, "Plan", torch.Generator], Tensor]


@dataclass(frozen=True)
class Method:
    """A row of the table. Without `sparsify` it works on factors as a whole (`whole`) and takes no space or density."""

    whole: Callable[[Sequence[Term]], Pair] | None = None
    sparsify: Sparsify | None = None
    elects: bool = False
    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    space: str = "full"

    @property
    def random(self) -> bool:
        """Whether a seed matters."""
        return self.sparsify in (_drop, _drop_small)


def _largest(task: Tensor, plan: Plan, generator: torch.Generator) -> Tensor:
    return sparse.largest(task, plan.density)


def _band(task: Tensor, plan: Plan, generator: torch.Generator) -> Tensor:
    return sparse.band(task, plan.density, plan.gamma)


def _drop(task: Tensor, plan: Plan, generator: torch.Generator) -> Tensor:
    return sparse.drop(task, plan.density, generator)


def _drop_small(task: Tensor, plan: Plan, generator: torch.Generator) -> Tensor:
    return sparse.drop_small(task, plan.density, plan.epsilon, generator)


METHODS = {
    "cat": Method(factors.total),
    "svd": Method(factors.total),
    "linear": Method(factors.linear),
    "ties": Method(sparsify=_largest, elects=True, density=0.2),
    "dare-linear": Method(sparsify=_drop, density=0.5),
    "dare-ties": Method(sparsify=_drop, elects=True, density=0.5),
    "della-linear": Method(sparsify=_drop_small, density=0.5, epsilon=0.1),
    "della": Method(sparsify=_drop_small, elects=True, density=0.5, epsilon=0.1),
    "magnitude-prune": Method(sparsify=_largest, density=0.5),
    "breadcrumbs": Method(sparsify=_band, density=0.9, gamma=0.01),
    "breadcrumbs-ties": Method(sparsify=_band, elects=True, density=0.9, gamma=0.01),
    "knots": Method(sparsify=_largest, elects=True, density=0.2, space="knots"),
    "core": Method(sparsify=_largest, elects=True, density=0.2, space="core"),
    "tsv": Method(spectral.tsv),
    "iso-c": Method(spectral.iso_c),
}


@dataclass(frozen=True)
class Plan:
    """A method with all its settings; `plan` makes a valid one."""

    method: str
    rank: int | None = None
    space: str | None = None
    like: str | None = None
    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Merged:
    """One layer's result, float64 lora_A (rank, d_in), lora_B (d_out, rank), scaling 1.

    `lost` is the relative Frobenius error of truncating what the method gave to that rank.
    """

    lora_A: Tensor
    lora_B: Tensor
    lost: float = 0.0


def plan(method: str, **settings: object) -> Plan:
    """Validate settings and fill in the method's own where they are None. Raises `ConfigError`.

    `space` (full, factors, core, knots), `density`, `gamma` and `epsilon` are for the methods that choose single values;
    `like` "peft" works on A and B apart (space factors) and elects before the weights, "mergekit" divides by weights.
    `rank` truncates the result; `scale` multiplies it (TIES' λ); `seed` is that of the random methods.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}; there are: {', '.join(METHODS)}")
    own, given = METHODS[method], Plan(method, **{k: v for k, v in settings.items() if v is not None})
    if given.like not in (None, "peft", "mergekit"):
        raise ConfigError(f"like is peft or mergekit, not {given.like!r}")
    if given.rank is not None and method == "cat":
        raise ConfigError("cat is exact and its rank the sum of all: use svd for a smaller one")
    if given.rank is not None and not (isinstance(given.rank, int) and given.rank >= 1):
        raise ConfigError(f"rank must be a whole number, at least 1, not {given.rank}")
    if not math.isfinite(given.scale):
        raise ConfigError(f"scale is what the result is multiplied by, a finite number, not {given.scale}")
    if own.sparsify is None:
        for key in ("space", "density", "gamma", "epsilon"):
            if getattr(given, key) is not None:
                raise ConfigError(f"{key} has no effect with method {method}")
        return given
    for key in ("gamma", "epsilon"):
        if getattr(given, key) is not None and getattr(own, key) is None:
            raise ConfigError(f"{key} has no effect with method {method}")
    if given.space is not None and own.space != "full" and given.space != own.space:
        raise ConfigError(f"{method} is TIES in its own space: use ties with space {given.space}")
    space = given.space or ("factors" if given.like == "peft" and own.space == "full" else own.space)
    if space not in SPACES:
        raise ConfigError(f"there is no space {space!r}; there are: {', '.join(SPACES)}")
    filled = {k: getattr(own, k) for k in ("density", "gamma", "epsilon") if getattr(given, k) is None}
    done = replace(given, space=space, **filled)
    _check_ranges(done)
    return done


def _check_ranges(plan: Plan) -> None:
    if not 0 < plan.density <= 1:
        raise ConfigError(f"density is the share of values kept, above 0 up to 1, not {plan.density}")
    if plan.gamma is not None and not 0 <= plan.gamma <= 1 - plan.density + 1e-12:
        raise ConfigError(
            f"gamma is what goes at the top and density what stays: {plan.gamma} + {plan.density} is above 1"
        )
    if plan.epsilon is not None:
        sparse.check_epsilon(plan.density, plan.epsilon)


def combine(terms: Sequence[Term], plan: Plan, *, key: str = "") -> Merged:
    """One layer's result. `key` (its name) and the seed fix what is random, whatever other layers there are."""
    if plan.method == "svd":
        plan = replace(plan, rank=plan.rank or max(t.rank for t in terms))
    method = METHODS[plan.method]
    if method.whole:
        return _finish(method.whole(terms), plan)
    if plan.space == "factors":
        return _finish(_on_factors(terms, plan, key), plan)
    weights = [t.weight for t in terms]
    if plan.space == "full":
        tasks = [b @ a for a, b in (t.task() for t in terms)]
        merged = _on_values(tasks, weights, plan, generators(plan.seed, key, len(terms)))
        return _finish_dense(merged, plan, sum(t.rank for t in terms))
    basis = (bases.knots if plan.space == "knots" else bases.core_space)(terms)
    merged = _on_values(basis.coordinates, weights, plan, generators(plan.seed, key, len(terms)))
    return _finish(basis.back(merged), plan)


def generators(seed: int, key: str, count: int) -> list[torch.Generator]:
    """One random generator for each adapter in a layer."""
    digests = [hashlib.sha256(f"{seed} {key} {i}".encode()).digest() for i in range(count)]
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")) for digest in digests]


def _on_values(tasks: list[Tensor], weights: list[float], plan: Plan, draws: list[torch.Generator]) -> Tensor:
    method = METHODS[plan.method]
    kept = [method.sparsify(task, plan, draw) for task, draw in zip(tasks, draws)]
    return sparse.elect(kept, weights, plan.like) if method.elects else sparse.weighted_sum(kept, weights)


def _on_factors(terms: Sequence[Term], plan: Plan, key: str) -> Pair:
    """A and B as task vectors of their own, each weighted by √|w·s| and A by the sign too, as PEFT does."""
    factors.same_rank(terms)
    draws = generators(plan.seed, key, len(terms))
    roots = [abs(t.weight * t.scaling) ** 0.5 for t in terms]
    signed = [-root if t.weight * t.scaling < 0 else root for root, t in zip(roots, terms)]
    lora_A = _on_values([t.lora_A.double() for t in terms], signed, plan, draws)
    return lora_A, _on_values([t.lora_B.double() for t in terms], roots, plan, draws)


def _finish(pair: Pair, plan: Plan) -> Merged:
    lost = 0.0
    if plan.rank is not None and plan.rank < pair[0].shape[0]:
        whole, pair = pair, factors.truncate(pair, plan.rank)
        size = factors.norm(whole)
        lost = factors.distance(whole, pair) / size if size else 0.0
    return _scaled(pair, plan, lost)


def _finish_dense(matrix: Tensor, plan: Plan, rank: int) -> Merged:
    pair = factors.truncate_dense(matrix, min(plan.rank or rank, *matrix.shape))
    size = torch.linalg.vector_norm(matrix)
    left = torch.linalg.vector_norm(matrix - pair[1] @ pair[0])
    return _scaled(pair, plan, float(left / size) if size else 0.0)


def _scaled(pair: Pair, plan: Plan, lost: float) -> Merged:
    lora_A, lora_B = pair
    if not lora_A.shape[0]:  # nothing is left: a file needs rank 1
        lora_A, lora_B = lora_A.new_zeros(1, lora_A.shape[1]), lora_B.new_zeros(lora_B.shape[0], 1)
    return Merged(lora_A, plan.scale * lora_B, lost)

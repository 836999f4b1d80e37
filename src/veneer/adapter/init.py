"""How A and B start: one function per initialisation, one table of names.

Each takes (rank, d_in, d_out, generator), returns float32 lora_A (rank, d_in) and lora_B (d_out, rank) on the CPU and
leaves ΔW = 0 (for "orthogonal" up to rounding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from veneer.config import AdapterConfig
from veneer.errors import ConfigError


@dataclass(frozen=True)
class Start:
    """How one target's factors start: float32 lora_A (rank, d_in) and lora_B (d_out, rank).

    `changes_base`: the factors assume the base W − s·B·A. `rank` and `alpha`, where given, replace the target's.
    """

    lora_A: Tensor
    lora_B: Tensor
    changes_base: bool = False
    rank: int | None = None
    alpha: float | None = None


def kaiming(rank: int, d_in: int, d_out: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """A ~ U(−1/√d_in, 1/√d_in), which is Kaiming's uniform with a = √5 as nn.Linear has it; B = 0."""
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator), torch.zeros(d_out, rank)


def gaussian(rank: int, d_in: int, d_out: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1/rank²), B = 0."""
    return torch.empty(rank, d_in).normal_(0, 1 / rank, generator=generator), torch.zeros(d_out, rank)


def orthogonal(rank: int, d_in: int, d_out: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """A and B both start non-zero, in orthogonal halves of one random rank-dimensional space, so B·A = 0.

    With Q (rank × rank) orthogonal: A = (Q_oddᵀ X)/10 and B = (Y Q_even)/10, X and Y Gaussian; Q_even Q_oddᵀ = 0.
    """
    if rank % 2:
        raise ConfigError(f"init 'orthogonal' needs an even rank, not {rank}")
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    lora_A = q[0::2].t() @ torch.randn(rank // 2, d_in, generator=generator) / 10
    lora_B = torch.randn(d_out, rank // 2, generator=generator) @ q[1::2] / 10
    return lora_A.contiguous(), lora_B.contiguous()


INITIALISATIONS: dict[str, Callable[[int, int, int, Generator | None], tuple[Tensor, Tensor]]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
}


def start(
    model: nn.Module,
    targets: Sequence[Any],
    config: AdapterConfig,
    *,
    seed: int | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> list[Start]:
    """The factors of each target, in order. Raises `ConfigError`."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found = []
    for target in targets:
        layer = target.layer()
        copies = getattr(layer, "experts", 1) if target.kind == "parameter" else 1
        if target.kind == "embedding":  # as PEFT: the looked-up factor starts at zero
            lora_A = torch.zeros(target.rank, layer.d_in)
            found.append(Start(lora_A, torch.empty(layer.d_out, target.rank).normal_(generator=generator)))
            continue
        lora_A, lora_B = INITIALISATIONS[config.init](target.rank * copies, layer.d_in, layer.d_out, generator)
        if target.kind == "conv":
            lora_B = lora_B[:, : target.rank // target.module.groups]
        found.append(Start(lora_A, lora_B))
    return found

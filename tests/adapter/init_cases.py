"""What the tests of the initialisations share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import tiny_llama
from veneer.adapter.init import DATA_DRIVEN, start
from veneer.adapter.targets import select
from veneer.config import AdapterConfig

RANK, ALPHA = 4, 6.0
SPECTRAL = ["pissa", "olora", "corda", "lora_ga"]


@pytest.fixture
def decaying_llama():
    """A model whose weights have falling singular values, as trained ones do: no two starts are equally good."""
    model = tiny_llama()
    for weight in (p for p in model.parameters() if p.dim() == 2):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(u * 0.8 ** torch.arange(len(s)) @ vh)
    return model


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 5, length: int = 23) -> list[dict]:
    """One sequence each, the first tokens unsupervised."""
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(1, 420, (1, length), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": torch.where(torch.arange(length) < 6, -100, i)} for i in ids]


def starts(model: nn.Module, calibration=None, **options) -> dict:
    """The starts of all the model's linears by name."""
    config = AdapterConfig(**{"rank": RANK, "alpha": ALPHA} | options)
    targets, calibration = select(model, config), calibration if config.init in DATA_DRIVEN else None
    found = start(model, targets, config, seed=3, calibration=calibration)
    return {target.name: one for target, one in zip(targets, found, strict=True)}


def same_up_to_sign(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-3) -> None:
    """Rows of a and b agree, each up to its sign."""
    sign = torch.sign((a * b).sum(1, keepdim=True))
    assert (a - sign * b).norm() <= rtol * b.norm()


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean squared cosine between the row spaces of a and b: 1 if they are the same."""
    a, b = torch.linalg.qr(a.t()).Q, torch.linalg.qr(b.t()).Q
    return float((a.t() @ b).square().sum() / a.shape[1])

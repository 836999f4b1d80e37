"""EVA (Paischer et al. 2024, arXiv:2410.07170): A spans what the inputs vary in most, ranks go where they vary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from veneer.adapter.init.spectral import low_rank_svd


class StreamedPCA:
    """The leading principal components of rows that come in batches, with no batch kept.

    Ross et al. 2008 (doi:10.1007/s11263-007-0075-7): what is known, S·Vᵀ about the old mean, is stacked on the new
    rows about theirs, with one row for the shift of the mean, and decomposed anew. State: k × d float32.
    """

    def __init__(self, components: int, generator: Generator | None = None) -> None:
        self.components, self.generator = components, generator
        self.rows, self.square = 0, 0.0
        self.mean = self.singular = self.vectors = None

    def update(self, x: Tensor) -> None:
        """Take in further rows x (n, d), float32."""
        if not len(x):
            return
        mean = x.mean(0)
        stack = x - mean
        self.square += float(stack.square().sum())
        total = self.rows + len(x)
        if self.rows:
            shift = (self.rows * len(x) / total) ** 0.5 * (self.mean - mean)
            self.square += float(shift.square().sum())
            stack = torch.cat([self.singular[:, None] * self.vectors, stack, shift[None]])
            mean = self.mean + (mean - self.mean) * (len(x) / total)
        if 2 * self.components < min(stack.shape):
            _, s, vh = low_rank_svd(stack, 2 * self.components, 4, self.generator)
        else:
            _, s, vh = torch.linalg.svd(stack, full_matrices=False)
        self.singular, self.vectors = s[: self.components], vh[: self.components]
        self.mean, self.rows = mean, total

    @property
    def explained(self) -> Tensor:
        """Share of the rows' variance that each component holds, (k,), largest first."""
        return self.singular.square() / max(self.square, torch.finfo(torch.float32).tiny)


def redistribute(explained: Sequence[Tensor], budget: int) -> list[int]:
    """Rank of each target: of all their components, the `budget` with the largest share of variance are kept."""
    owner = torch.cat([torch.full((len(e),), i) for i, e in enumerate(explained)])
    order = torch.cat([e.cpu() for e in explained]).argsort(descending=True, stable=True)
    return torch.bincount(owner[order[:budget]], minlength=len(explained)).tolist()

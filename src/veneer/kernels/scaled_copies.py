"""Many small matrices copied at once, each times a number: one launch where triton is there."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor


def copy_plain(sources: Sequence[Tensor], targets: Sequence[Tensor], factors: Sequence[float]) -> None:
    """targets[n] ← factors[n]·sources[n], rounded to the target's dtype: the definition of `ScaledCopies.run`."""
    for source, target, factor in zip(sources, targets, factors):
        target.copy_(source * factor)


class ScaledCopies:
    """Repeated copies between the same matrices: where they lie is put on the device once."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self._longest = 0

    def run(self, sources: Sequence[Tensor], targets: Sequence[Tensor], factors: Sequence[float]) -> None:
        """As `copy_plain`. On a GPU the sources must be contiguous and the targets' last stride 1."""
        key = (*[s.data_ptr() for s in sources], *[t.data_ptr() for t in targets], *factors)
        if key != self._key:  # the device waits for this: what is known is not looked up again
            same = len({(s.dtype, t.dtype) for s, t in zip(sources, targets)}) == 1
            fits = all(s.is_contiguous() and t.stride(-1) == 1 for s, t in zip(sources, targets))
            self._key = None
            if not (sources[0].is_cuda and same and fits and find_spec("triton")):
                return copy_plain(sources, targets, factors)
            rows = [(s.data_ptr(), t.data_ptr(), s.numel(), t.shape[1], t.stride(0)) for s, t in zip(sources, targets)]
            device = sources[0].device
            self._tables = torch.tensor(rows, device=device), torch.tensor(factors, device=device)
            self._longest, self._key = max(s.numel() for s in sources), key
        from veneer.kernels.scaled_copies_triton import launch

        launch(*self._tables, sources[0], targets[0], self._longest)

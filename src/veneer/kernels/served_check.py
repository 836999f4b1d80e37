"""Whether the serving kernels compute on this GPU what their definitions do: tried once, before a server trusts them."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels import served_prompts
from veneer.kernels.served import ROWS, expand, expand_twin, shrink, shrink_twin, tile_rows

SIZES = (ROWS + 3, 80, (48, 33))
"""Rows, input width and output widths of the trial; two adapters and rows without one."""
RANK = 16


def deviation(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of `shrink` and `expand` to their twins, over the largest value; inf where they fail.

    Tried with tiles of single rows, as in a decoding step, and with those of prompts.
    """
    rows, width, widths = SIZES
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    x, A, B = random(rows, width), random(2, width, len(widths) * RANK), [random(2, RANK, o) for o in widths]
    places = [[0] for _ in range(rows - 2)] + [[1], []]
    single = torch.tensor(tile_rows(places, 1)).view(1, rows, 1 + ROWS)
    many = served_prompts.use_tiles([(0, rows - 2, [0]), (rows - 2, rows - 1, [1])], 1, 2)
    weights, differences = torch.ones(rows, 1, device=device), []
    try:
        for tiles in (single.to(device), many.to(device)):
            found, wanted = ([random(rows, o).mul_(0) for o in widths] for _ in range(2))
            expand(shrink(x, A, tiles), B, tiles, weights, found)
            expand_twin(shrink_twin(x, A, tiles), B, tiles, weights, wanted)
            differences += [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(found, wanted)]
    except Exception:  # noqa: BLE001 whatever a compiler or driver says: the plain way is there
        return float("inf")
    return float(torch.stack(differences).max())  # NaN if any is


def sound(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can be trusted here: as near to their definitions as `dtype` rounds."""
    return deviation(device, dtype) <= (1e-4 if dtype == torch.float32 else 2e-2)

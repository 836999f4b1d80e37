"""Whether the serving kernels compute on this GPU what their definitions do: tried once, before a server trusts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels import served_prompts
from veneer.kernels.served import ROWS, expand, expand_twin, shrink, shrink_twin, tile_rows
from veneer.kernels.served_attention import attend, attend_twin
from veneer.kernels.served_block_check import Trial
from veneer.kernels.served_prompts import QUERIES, attend_pieces, attend_pieces_twin, most_tiles, piece_tiles

RANK = 16
CONTEXT = 1216
"""Enough for parts of several tiles of keys, as long contexts have; the last part is a short one."""
PIECES = [(2, 0, 70), (0, 5, 1), (3, 61, 67), (1, 129, 33)]
"""(slot, position of the first token, tokens) in the trial of prompts' attention."""


@dataclass(frozen=True)
class Shapes:
    """What the trial is made of; a server's is its model's."""

    linears: tuple[tuple[int, tuple[int, ...]], ...] = ((80, (48, 33)),)
    """Input width, and output widths of linears that read it."""
    heads: tuple[int, int, int] = (2, 3, 24)
    """Key heads, queries of each, head width."""
    windows: tuple[int | None, ...] = (None, 9)
    block: tuple[int, int, bool] | None = None
    """Where blocks are served whole: widths of the residual stream and of the gated activation, and whether q and k are
    normed by head."""


def deviation(
    device: torch.device, dtype: torch.dtype, shapes: Shapes = Shapes(), cache: torch.dtype | None = None
) -> float:
    """The largest difference of a kernel to its twin, over the twin's largest value; inf where one fails.

    `cache` is the dtype of keys and values, `dtype` unless given. Tried with tiles of single rows and attention of one
    query, as in a decoding step, and with those of prompts.
    """
    try:
        pairs = [*_updates(device, dtype, shapes), *_attention(device, cache or dtype, shapes)]
        return float(torch.stack([_difference(found, wanted) for found, wanted in pairs]).max())  # NaN if any is
    except Exception:  # noqa: BLE001 whatever a compiler or driver says: the plain way is there
        return float("inf")


def sound(
    device: torch.device, dtype: torch.dtype, shapes: Shapes = Shapes(), cache: torch.dtype | None = None
) -> bool:
    """Whether the kernels can be trusted here: as near to their definitions as both dtypes round."""
    exact = {dtype, cache or dtype} == {torch.float32}
    return deviation(device, dtype, shapes, cache) <= (1e-4 if exact else 2e-2)


def sound_blocks(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> bool:
    """Whether the kernels of whole blocks can be trusted here, with tiles of all sizes."""
    options = dict(zip(("D", "I", "norms"), shapes.block), heads=shapes.heads)
    try:
        trials = [Trial(dtype, device, size, **options) for size in (1, ROWS, served_prompts.ROWS)]
        worst = torch.stack([_difference(*pair[1:]) for trial in trials for pair in trial.pairs()]).max()
    except Exception:  # noqa: BLE001 whatever a compiler or driver says: the models' own blocks are there
        return False
    return bool(worst <= (1e-4 if dtype == torch.float32 else 2e-2))


def _difference(found: Tensor, wanted: Tensor) -> Tensor:
    return (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()


def _draws(device: torch.device, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=draw).to(device, dtype)


def _updates(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of `shrink` and `expand`, and of their twins: two adapters, a row that stacks both, and one without."""
    random, rows = _draws(device, dtype), served_prompts.ROWS + ROWS + 1
    runs = [(0, rows - 3, [0]), (rows - 3, rows - 2, [1, 0]), (rows - 2, rows - 1, [1])]
    places = [own for start, end, own in runs for _ in range(start, end)] + [[]]
    tiles = (
        torch.tensor(tile_rows(places, 2)).view(2, rows, 1 + ROWS),
        served_prompts.use_tiles(runs, 2, most_tiles(rows, len(runs), served_prompts.ROWS)),
    )
    for width, widths in shapes.linears:
        x, A, B = random(rows, width), random(2, width, len(widths) * RANK), [random(2, RANK, o) for o in widths]
        weights, before = torch.rand(rows, 2).to(device), [random(rows, o) for o in widths]
        for table in (table.to(device) for table in tiles):
            found, wanted = ([y.clone() for y in before] for _ in range(2))
            expand(shrink(x, A, table), B, table, weights, found)
            expand_twin(shrink_twin(x, A, table), B, table, weights, wanted)
            yield from zip(found, wanted)


def _attention(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of both kernels of attention, and of their twins, at odd lengths and in several slots."""
    random, (K, G, D), rows = _draws(device, dtype), shapes.heads, sum(count for *_, count in PIECES)
    keys, values = random(4, K, CONTEXT, D), random(4, K, CONTEXT, D)
    slots, positions = torch.tensor([3, 0, 2, 1], device=device), torch.tensor([0, CONTEXT - 1, 64, 17], device=device)
    tiles = piece_tiles(PIECES, most_tiles(rows + 5, len(PIECES), QUERIES)).to(device)
    one, many = random(len(slots), K, G, D), random(rows + 5, K * G, D)
    for window in shapes.windows:
        options = D**-0.5, window
        yield tuple(f(one, keys, values, slots, positions, *options) for f in (attend, attend_twin))
        yield tuple(f(many, keys, values, tiles, *options) for f in (attend_pieces, attend_pieces_twin))

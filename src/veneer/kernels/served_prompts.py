"""Pieces of prompts, one after another in T rows, for the kernels of `served`: their tables, and attention over slots.

Legend: T rows, U uses, N tiles, S slots, C context, H heads, K key heads, D head width. A piece is (slot, position of
its first token, tokens); a tile is part of one piece, so that a row's sums do not depend on the other pieces.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.served import _jit, _power, _runs, _weighed, tl

ROWS = 32
"""Rows of a tile of `shrink` and `expand`: prompts bring many for each adapter."""
QUERIES = 64
"""Rows of a tile of attention."""


@_jit
def _attend_pieces(q, keys, values, tiles, y, scale, window, C, H, G, D, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip # noqa: E501
    head, tile, skip = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BM  # a tile's rows, BM a program
    slot, row = tl.load(tiles + tile * 4).to(tl.int64), tl.load(tiles + tile * 4 + 1).to(tl.int64) + skip
    first = tl.load(tiles + tile * 4 + 2).to(tl.int32) + skip
    count = tl.minimum(tl.load(tiles + tile * 4 + 3).to(tl.int32) - skip, BM)
    if count > 0:
        m, d = tl.arange(0, BM), tl.arange(0, BD)
        at = ((row + m[:, None]) * H + head) * D + d[None, :]
        inside = (m[:, None] < count) & (d[None, :] < D)
        query = tl.load(q + at, mask=inside, other=0.0)
        best = tl.full((BM,), float("-inf"), tl.float32)
        mass = tl.zeros((BM,), tl.float32)
        total = tl.zeros((BM, BD), tl.float32)
        own = (slot * (H // G) + head // G) * C
        last, position = first + count, first + m
        for start in range(tl.maximum(first + 1 - window, 0) // BN * BN, last, BN):
            n = start + tl.arange(0, BN)
            seen = (n[:, None] < last) & (d[None, :] < D)
            k = tl.load(keys + (own + n[:, None]) * D + d[None, :], mask=seen, other=0.0)
            v = tl.load(values + (own + n[:, None]) * D + d[None, :], mask=seen, other=0.0)
            score = tl.dot(query, tl.trans(k), input_precision="tf32x3") * scale  # of float32: ieee would spill
            visible = (n[None, :] <= position[:, None]) & (n[None, :] > position[:, None] - window)
            score = tl.where(visible, score, float("-inf"))
            p, keep, best, mass = _weighed(score, best, mass)
            total = total * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
        tl.store(y + at, (total / mass[:, None]).to(y.dtype.element_ty), mask=inside)


def most_tiles(rows: int, pieces: int, size: int) -> int:
    """How many tiles `pieces` pieces of together `rows` rows can need; by sixteens, so that kernels are compiled once."""
    return -(-(rows // size + min(rows, pieces)) // 16) * 16


def piece_tiles(pieces: Sequence[tuple[int, int, int]], count: int) -> Tensor:
    """Pieces → tiles (count, 4) int64 of attention: slot, first row, its position, rows; 0 rows where there is none."""
    tiles, start = [], 0
    for slot, first, length in pieces:
        tiles += [(slot, start + at, first + at, min(QUERIES, length - at)) for at in range(0, length, QUERIES)]
        start += length
    return F.pad(torch.tensor(tiles, dtype=torch.int64).view(-1, 4), (0, 0, 0, count - len(tiles)))


def use_tiles(runs: Sequence[tuple[int, int, Sequence[int]]], uses: int, count: int) -> Tensor:
    """Runs (first row, end, places of their uses) → tiles (U, count, 1 + ROWS) int64, -1 where none is; the first use's
    tiles have all rows of the runs, as those of `served.tile_rows`."""
    tiles = torch.full((uses, count, 1 + ROWS), -1, dtype=torch.int64)
    for use in range(uses):
        found = [
            (places[use] if places else -1, at, end)
            for start, end, places in runs
            if use < max(1, len(places))
            for at in range(start, end, ROWS)
        ]
        if found:
            place, at, end = torch.tensor(found).unsqueeze(1).unbind(2)
            rows = at + torch.arange(ROWS)
            tiles[use, : len(found)] = torch.cat([place, torch.where(rows < end, rows, -1)], 1)
    return tiles


def program_rows(width: int, element: int) -> int:
    """Rows and keys that a program of attention takes at a time, with heads of `width` numbers of `element` bytes.

    Four warps, for a Hopper warp group's product has 64 rows: with eight, triton 3.6 has the second group read rows
    that the tile does not have. Below 64 rows the products are those of single warps, which wide heads leave room for.
    """
    return min(QUERIES, max(16, 16384 // (width * element)))


def attend_pieces(
    q: Tensor, keys: Tensor, values: Tensor, tiles: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Each row of a piece over its slot's keys up to its own position (the last `window` of them).

    q (T, H, D), keys and values (S, K, C, D), tiles (N, 4) → (T, H, D), zeros in rows that no tile names.
    """
    if not _runs(q):
        return attend_pieces_twin(q, keys, values, tiles, scale, window)
    (_, H, D), (_, K, C, _) = q.shape, keys.shape
    out, BD = torch.zeros_like(q), max(16, _power(D))
    size = program_rows(BD, q.element_size())
    _attend_pieces[(H, tiles.shape[0], QUERIES // size)](
        q, keys, values, tiles, out, scale, C if window is None else window, C, H, H // K, D, size, size, BD,
        num_warps=4, num_stages=2 if q.element_size() == 2 else 1,
    )  # fmt: skip
    return out


def attend_pieces_twin(
    q: Tensor, keys: Tensor, values: Tensor, tiles: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """The definition of `attend_pieces`."""
    out, groups = torch.zeros_like(q), q.shape[1] // keys.shape[1]
    for slot, row, first, count in tiles.tolist():
        position = first + torch.arange(count, device=q.device).unsqueeze(1)
        n = torch.arange(first + count, device=q.device)
        unseen = n > position if window is None else (n > position) | (n <= position - window)
        k, v = (t[slot, :, : first + count].float().repeat_interleave(groups, 0) for t in (keys, values))
        scores = torch.einsum("thd,hnd->htn", q[row : row + count].float(), k) * scale
        weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        out[row : row + count] = torch.einsum("htn,hnd->thd", weights, v).to(q.dtype)
    return out

"""Triton kernels of attention over slots, one query a row: in parts of the context, which are gathered by head.

Legend: B rows, S slots, C context, K key heads, G queries of a key head, E width of a head, M rows of a tile. Tiles are
those of `served`, and the definitions in plain torch are `attend_twin` and `gather_twin`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels.served import (
    Table,
    _factor,
    _jit,
    _power,
    _runs,
    _shrunk,
    _tile,
    _weighed,
    next_parts,
    tl,
    twin_parts,
)

PROGRAMS = 1024
"""Programs that a GPU is busy with: as many parts of a context as make so many, 16 at most."""


class Attended(NamedTuple):
    """Parts of `split` keys: outputs `part` (B, K, N, G, E) and logarithms of masses (B, K, N, G), float32. Those in which
    a row sees no key, by its own of `positions` (B) and `window`, are not written."""

    part: Tensor
    mass: Tensor
    positions: Tensor
    split: int
    window: int


@_jit
def _attend(q, keys, values, slots, positions, part, mass_log, scale, window, rows, C, K, G, E, SPLIT: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, BE: tl.constexpr):  # fmt: skip # noqa: E501
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, length = tl.load(slots + row).to(tl.int64), tl.load(positions + row).to(tl.int32) + 1
    first = tl.maximum(split * SPLIT, length - window)
    last = tl.minimum(split * SPLIT + SPLIT, length)
    g, e = tl.arange(0, BG), tl.arange(0, BE)
    if first < last:
        out = (row * K + head) * SPLITS + split
        best = tl.full((BG,), float("-inf"), tl.float32)
        mass = tl.zeros((BG,), tl.float32)
        total = tl.zeros((BG, BE), tl.float32)
        inside = (g[:, None] < G) & (e[None, :] < E)
        query = tl.load(q + ((row * K + head) * G + g[:, None]) * E + e[None, :], mask=inside, other=0.0)
        for start in range(first // BN * BN, last, BN):
            n = start + tl.arange(0, BN)
            at = ((slot * K + head) * C + n[:, None]) * E + e[None, :]
            there = (n >= first) & (n < last)
            seen = there[:, None] & (e[None, :] < E)
            k = tl.load(keys + at, mask=seen, other=0.0)
            v = tl.load(values + at, mask=seen, other=0.0)
            score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            score = tl.where(there[None, :], score, float("-inf"))
            p, keep, best, mass = _weighed(score, best, mass)
            total = total * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        tl.store(part + (out * G + g[:, None]) * E + e[None, :], total / mass[:, None], mask=inside)
        tl.store(mass_log + out * G + g, best + tl.log(mass), mask=g < G)


@_jit
def _gather(part, mass, positions, tiles, A, y, parts, window, rows, K, G, E, W: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr, BW: tl.constexpr, BE: tl.constexpr):  # fmt: skip # noqa: E501
    head, e = tl.program_id(0), tl.arange(0, BE)
    place, row = _tile(tiles, tl.program_id(1), M)
    if tl.max(row, 0) >= 0:
        there, width = row >= 0, K * G * E
        length = tl.load(positions + row, mask=there, other=-1).to(tl.int32) + 1
        first, last = tl.maximum(length - window, 0) // SPLIT, tl.cdiv(length, SPLIT)
        i = tl.where(e < E, head * E + e, width)
        if BW:
            a = _factor(A, place, i, 0, width, W, BW)
        best = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        out = tl.zeros((M, BE), tl.float32)
        for split in range(0, tl.max(last, 0)):
            at, seen = ((row * K + head // G) * SPLITS + split) * G + head % G, (split >= first) & (split < last)
            share = tl.load(mass + at, mask=seen, other=float("-inf"))
            own = tl.load(part + at[:, None] * E + e[None, :], mask=seen[:, None] & (e[None, :] < E), other=0.0)
            new = tl.maximum(best, share)
            base = tl.where(new > float("-inf"), new, 0.0)
            keep, share = tl.exp(best - base), tl.exp(share - base)
            out = tl.fma(out, keep[:, None], share[:, None] * own)  # spelled out, so that all variants round alike
            total, best = tl.fma(total, keep, share), new
        v = (out / tl.where(there, total, 1.0)[:, None]).to(y.dtype.element_ty)
        tl.store(y + row[:, None] * width + i[None, :], v, mask=there[:, None] & (e[None, :] < E))
        if BW:
            if place >= 0:
                _shrunk(v, a, A, parts, place, row, head, i, rows, width, 1.0, W, M, BW)


def attend_parts(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float, window: int | None = None
) -> Attended:
    """One query a row over its slot's first positions+1 keys (its last `window` of them).

    q (B, K, G, E), keys and values (S, K, C, E), slots and positions (B).
    """
    if not _runs(q):
        return attend_parts_twin(q, keys, values, slots, positions, scale, window)
    (rows, K, G, E), C = q.shape, keys.shape[2]
    window = C if window is None else window
    wanted = min(16, max(1, PROGRAMS // (rows * K)))
    each = max(64, -(-C // wanted // 64) * 64)
    parts = -(-C // each)
    part = torch.empty(rows, K, parts, G, E, dtype=torch.float32, device=q.device)
    mass = torch.empty(rows, K, parts, G, dtype=torch.float32, device=q.device)
    BE = max(16, _power(E))
    BN = min(64, max(16, 16384 // (BE * q.element_size())))  # of float32 and wide heads, 64 keys at a time do not fit
    _attend[(rows, K, parts)](
        q, keys, values, slots, positions, part, mass, scale, window,
        rows, C, K, G, E, each, parts, BN, max(16, _power(G)), BE, num_stages=2,
    )  # fmt: skip
    return Attended(part, mass, positions, each, window)


def gather(attended: Attended, table: Table, A: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The heads' outputs (B, K·G·E) in the dtype of `like`, and parts of h for the A (P, K·G·E, W) that reads them."""
    part, mass, positions, split, window = attended
    if not _runs(like):
        return gather_twin(attended, table, A, like)
    (rows, K, splits, G, E), (count, M) = part.shape, table.tiles.shape
    y = torch.empty(rows, K * G * E, dtype=like.dtype, device=like.device)
    wide, parts, W, BW = next_parts(A, y, K * G, max(16, _power(E)), M - 1)
    _gather[(K * G, count)](
        part, mass, positions, table.tiles, wide, y, y if parts is None else parts, window, rows, K, G, E, W, split, splits,
        M - 1, BW, max(16, _power(E)), num_warps=1 if M == 2 else 4, num_stages=1,
    )  # fmt: skip
    return y, parts


def attend(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """`attend_parts`, gathered: (B, K, G, E)."""
    rows = torch.arange(q.shape[0], device=q.device)
    table = Table(torch.stack([torch.full_like(rows, -1), rows], 1), q)
    return gather(attend_parts(q, keys, values, slots, positions, scale, window), table, None, q)[0].view_as(q)


def attend_parts_twin(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float, window: int | None = None
) -> Attended:
    """The definition of `attend_parts`, in one part."""
    k, v = keys[slots].float(), values[slots].float()
    n, at = torch.arange(keys.shape[2], device=q.device), positions.unsqueeze(1)
    unseen = n > at if window is None else (n > at) | (n <= at - window)
    scores = torch.einsum("bkgd,bkcd->bkgc", q.float(), k) * scale
    scores = scores.masked_fill(unseen[:, None, None], float("-inf"))
    part = torch.einsum("bkgc,bkcd->bkgd", scores.softmax(-1), v)
    return Attended(part.unsqueeze(2), scores.logsumexp(-1).unsqueeze(2), positions, keys.shape[2], keys.shape[2])


def gather_twin(attended: Attended, table: Table, A: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The definition of `gather`."""
    share = attended.mass.softmax(2).unsqueeze(-1)
    y = torch.where(share > 0, attended.part * share, 0.0).sum(2).flatten(1).to(like.dtype)
    return y, twin_parts(y, A, table)


def attend_twin(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """The definition of `attend`."""
    return attend_parts_twin(q, keys, values, slots, positions, scale, window).part[:, :, 0].to(q)

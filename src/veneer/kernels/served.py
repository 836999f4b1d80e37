"""Triton kernels of a served pass over the model: each row's adapters, and attention over slots. All shapes are fixed.

They read what to do (tiles, slots, positions) from device memory, so that a captured CUDA graph of a pass serves any
adapters and any lengths. A tile is a place of the pool and up to M rows that use it: its factors are read once for all
of them, and a row's sums have one order whatever else is in its tile. Rows are one token of an answer each
(`served_attention.attend`), or pieces of prompts one after another (`served_prompts.attend_pieces`). The definitions in
plain torch are `shrink_twin` and `expand_twin`.

Legend: B rows, U uses (adapters a row may stack), N tiles of a use, M rows of a tile, I input width, O output width,
R rank, W = targets of a group · R, P places, S slots, C context, K key heads, G queries of a key head, D head width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

try:  # comes with torch's CUDA builds, and without one there is nothing to run this on
    import triton
    import triton.language as tl
except ImportError:
    triton = None

    class tl:  # for the annotations below, which triton wants as they are
        constexpr = int


ROWS = 16
"""Rows of one adapter that a program takes together in a decoding step: the least of a product on tensor cores."""


@dataclass(frozen=True)
class Sizes:
    """How the work is cut into programs. `share` bytes of A a program, `stage` bytes of a factor at a time."""

    share: int = 32768
    stage: int = 16384
    columns: int = 512
    """Outputs of an expand's program with 16 rows, half as many with 32."""
    shrink_warps: int = 4
    expand_warps: int = 4
    stages: int = 3


SIZES = Sizes()


COUNTS = ("use", "uses", "rows", "count", "entries")
"""What differs from batch to batch: compiled once for all values, not again for 1 and for multiples of 16."""


def _jit(function):
    if triton is None:
        return function
    counts = [name for name in signature(function).parameters if name in COUNTS]
    return triton.jit(do_not_specialize=counts)(function)


@_jit
def _times(v, a, total, M: tl.constexpr):
    """total + v a, for v (M, K) and a (K, N): on tensor cores but for a single row, whose tiles would be empty rows."""
    if M == 1:
        total += tl.sum(tl.sum(v.to(tl.float32), 0)[:, None] * a.to(tl.float32), 0)[None, :]
    else:
        total = tl.dot(v, a, total, input_precision="ieee")
    return total


@_jit
def _tile(tiles, n, M: tl.constexpr):
    """The place and the rows of tile n."""
    at = tiles + n * (M + 1)
    return tl.load(at).to(tl.int64), tl.load(at + 1 + tl.arange(0, M)).to(tl.int64)


@_jit
def _weighed(score, best, mass):
    """A step of a softmax over more scores (M, N), -inf where unseen, than are at hand: their weights, how much is kept
    of what there was, and the largest and the mass (M) of all so far."""
    new = tl.maximum(best, tl.max(score, 1))
    base = tl.where(new > float("-inf"), new, 0.0)  # nothing seen yet: no -inf less -inf
    p, keep = tl.exp(score - base[:, None]), tl.exp(best - base)
    return p, keep, new, mass * keep + tl.sum(p, 1)


@_jit
def _factor(A, place, i, start, I, W: tl.constexpr, BW: tl.constexpr):
    """BW columns of A of the inputs i; zeros where there are none, or no place."""
    w = start + tl.arange(0, BW)
    inside = (i[:, None] < I) & (w[None, :] < W) & (place >= 0)
    return tl.load(A + place * I * W + i[:, None] * W + w[None, :], mask=inside, other=0.0)


@_jit
def _shrunk(v, a, A, parts, place, row, n, i, rows, I, unit, W: tl.constexpr, M: tl.constexpr, BW: tl.constexpr):
    """Part n of h: unit · v (M, BI), zero beyond I, times A of the inputs i, whose first columns are at hand as `a`."""
    for start in range(0, W, BW):
        if start:
            a = _factor(A, place, i, start, I, W, BW)
        h = _times(v.to(a.dtype), a, tl.zeros((M, BW), tl.float32), M)
        w = start + tl.arange(0, BW)
        at = parts + (n * rows + row[:, None]) * W + w[None, :]
        tl.store(at, unit * h, mask=(row[:, None] >= 0) & (w[None, :] < W))


@_jit
def _shrink(x, A, tiles, hidden, count, entries, rows, I, W, SHARE: tl.constexpr, M: tl.constexpr, BI: tl.constexpr, BW: tl.constexpr):  # fmt: skip # noqa: E501
    split, tile = tl.program_id(0), tl.program_id(1)  # tile counts uses and their tiles; the first start first
    place, row = _tile(tiles, tile, M)  # both on their way while place is looked at
    if place >= 0:
        there, w = row >= 0, tl.program_id(2) * BW + tl.arange(0, BW)
        total = tl.zeros((M, BW), tl.float32)
        for start in range(0, SHARE, BI):
            i = split * SHARE + start + tl.arange(0, BI)
            seen, inside = there[:, None] & (i[None, :] < I), (i[:, None] < I) & (w[None, :] < W)
            v = tl.load(x + row[:, None] * I + i[None, :], mask=seen, other=0.0)
            a = tl.load(A + place * I * W + i[:, None] * W + w[None, :], mask=inside, other=0.0)
            total = _times(v, a, total, M)
        entry = split * entries + tile // count * rows + row
        tl.store(hidden + entry[:, None] * W + w[None, :], total, mask=there[:, None] & (w[None, :] < W))


@_jit
def _expand_block(hidden, B, weights, y, place, row, use, entries, rows, uses, block, O, W, offset, SPLITS: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr):  # fmt: skip # noqa: E501
    there, o = row >= 0, block * BO + tl.arange(0, BO)
    out, inside = y + row[:, None] * O + o[None, :], there[:, None] & (o[None, :] < O)
    before = tl.load(out, mask=inside, other=0.0)  # asked for first: it is on its way during the product
    weight = tl.load(weights + row * uses + use, mask=there, other=0.0)
    total = tl.zeros((M, BO), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        b = tl.load(B + place * R * O + r[:, None] * O + o[None, :], mask=o[None, :] < O, other=0.0)
        at = hidden + (use * rows + row[:, None]) * W + offset + r[None, :]
        h = tl.zeros((M, BR), tl.float32)
        for split in tl.static_range(SPLITS):
            h += tl.load(at + split * entries * W, mask=there[:, None], other=0.0)
        total = _times(h.to(b.dtype), b, total, M)
    tl.store(out, (before.to(tl.float32) + weight[:, None] * total).to(y.dtype.element_ty), mask=inside)


@_jit
def _expand(hidden, B0, B1, B2, tiles, weights, y0, y1, y2, use, count, entries, rows, uses, O0, O1, O2, W, offset, SPLITS: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr):  # fmt: skip # noqa: E501
    block, tile = tl.program_id(0), use * count + tl.program_id(1)  # block counts the blocks of all targets
    place, row = _tile(tiles, tile, M)
    if place >= 0:
        n0, n1 = tl.cdiv(O0, BO), tl.cdiv(O1, BO)
        if block < n0:
            _expand_block(hidden, B0, weights, y0, place, row, use, entries, rows, uses, block, O0, W, offset, SPLITS, R, M, BR, BO)  # fmt: skip # noqa: E501
        elif block < n0 + n1:
            _expand_block(hidden, B1, weights, y1, place, row, use, entries, rows, uses, block - n0, O1, W, offset + R, SPLITS, R, M, BR, BO)  # fmt: skip # noqa: E501
        else:
            _expand_block(hidden, B2, weights, y2, place, row, use, entries, rows, uses, block - n0 - n1, O2, W, offset + 2 * R, SPLITS, R, M, BR, BO)  # fmt: skip # noqa: E501


class Table(NamedTuple):
    """One use of each row: `tiles` (N, 1 + M) int64, and its adapter's `weights` (B, 1) float32."""

    tiles: Tensor
    weights: Tensor


def _runs(x: Tensor) -> bool:
    """Whether the kernels can run on a tensor; their twins can everywhere."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def tile_rows(rows: Sequence[Sequence[int]], uses: int, size: int = ROWS, count: int | None = None) -> list[int]:
    """The places of each row's uses → tiles (U, N, 1 + size), flat: a place and up to `size` rows, -1 where none is.

    N is `count`, or as many as there are rows, which is always enough; ValueError if it is not. Tiles with rows come first.
    A row's n-th use lies in the n-th tiles, so that no two tiles of a use share a row. The first use's tiles have all rows:
    those without an adapter lie in tiles of the place -1.
    """
    flat, room = [], len(rows) if count is None else count
    for use in range(uses):
        found: dict[int, list[int]] = {}
        for row, places in enumerate(rows):
            if use < max(1, len(places)):
                found.setdefault(places[use] if places else -1, []).append(row)
        tiles = [
            [place, *part, *[-1] * (size - len(part))]
            for place, own in found.items()
            for part in (own[at : at + size] for at in range(0, len(own), size))
        ]
        if len(tiles) > room:
            raise ValueError(f"{len(tiles)} tiles of {size} rows where there is room for {room}")
        flat += [n for tile in tiles for n in tile] + [-1] * ((room - len(tiles)) * (size + 1))
    return flat


def shrink(x: Tensor, A: Tensor, tiles: Tensor, sizes: Sizes = SIZES) -> Tensor:
    """h[n,u,b,w] = Σ_{i in part n} x[b,i] A[p,i,w] with p the place of row b's use u in `tiles`.

    x (B, I), A (P, I, W), tiles (U, N, 1 + M) int64 → (splits, U, B, W) float32. What no tile names is left as it is:
    nothing reads it.
    """
    if not _runs(x):
        return shrink_twin(x, A, tiles)
    (rows, width), (_, _, W), (uses, count, M) = x.shape, A.shape, tiles.shape
    M -= 1
    BW = min(64, max(16, _power(W)))
    BI = min(256, max(16, sizes.stage // (BW * A.element_size())))
    wanted = min(16 * ROWS // M, -(-width * min(W, BW) * A.element_size() // sizes.share))
    share = -(-width // (wanted * BI)) * BI
    parts = -(-width // share)
    hidden = torch.empty(parts, uses, rows, W, dtype=torch.float32, device=x.device)
    _shrink[(parts, uses * count, -(-W // BW))](
        x, A, tiles, hidden, count, uses * rows, rows, width, W, share, M, BI, BW,
        num_warps=sizes.shrink_warps, num_stages=sizes.stages,
    )  # fmt: skip
    return hidden


def expand(
    hidden: Tensor, B: Sequence[Tensor], tiles: Tensor, weights: Tensor, y: Sequence[Tensor], sizes: Sizes = SIZES
) -> None:
    """y[t][b,o] += weights[b,u] Σ_r (Σ_n h[n,u,b,t·R+r]) B[t][p,r,o] for u = 0, 1, …, in place, for all targets t.

    hidden (splits, U, B, n·R) float32, n B's of (P, R, O_t), tiles (U, N, 1 + M), weights (B, U) float32, y's (B, O_t).
    Rows that no tile names are not touched. R is a power of two, at least 16.
    """
    if not _runs(y[0]):
        return expand_twin(hidden, B, tiles, weights, y)
    (parts, uses, rows, W), rank, (_, count, M) = hidden.shape, B[0].shape[1], tiles.shape
    M -= 1
    BR = min(64, rank)
    BO = max(32, min(sizes.columns * ROWS // M, sizes.stage // (BR * B[0].element_size())))
    for first in range(0, len(B), 3):
        b, out = list(B[first : first + 3]), list(y[first : first + 3])
        widths = [t.shape[1] for t in out] + [0] * (3 - len(out))
        blocks = sum(-(-width // BO) for width in widths)
        b, out = (t + [t[0]] * (3 - len(t)) for t in (b, out))  # no block is a filler's
        for use in range(uses):
            _expand[(blocks, count)](
                hidden, *b, tiles, weights, *out, use, count, uses * rows, rows, uses, *widths, W, first * rank,
                parts, rank, M, BR, BO, num_warps=sizes.expand_warps,
            )  # fmt: skip


def next_parts(
    A: Tensor | None, x: Tensor, parts: int, columns: int, tile: int
) -> tuple[Tensor, Tensor | None, int, int]:
    """(A, room for so many parts of h, W, columns of it at a time) for the products that read x next; 0 for none.

    A program multiplies so many `columns` of x, of `tile` rows, by as much of A as registers hold; of float32 by less, for
    all terms of its products are spelled out, which takes a compiler long.
    """
    if A is None:
        return x, None, 0, 0
    W, small = A.shape[2], tile == 1 or x.dtype == torch.float32
    room = torch.empty(parts, x.shape[0], W, dtype=torch.float32, device=x.device)
    return A, room, W, 16 if small else max(16, min(64, 8192 // columns, _power(W)))


def twin_parts(x: Tensor, A: Tensor | None, table: Table) -> Tensor | None:
    """The definition of parts of h: x Aᵀ (1, B, W), zeros for rows without an adapter."""
    return None if A is None else shrink_twin(x, A, table.tiles[None]).squeeze(0)


def places_of(tiles: Tensor, rows: int) -> Tensor:
    """tiles (U, N, 1 + M) → each row's places (B, U), -1 for none."""
    owners, places = tiles[..., 1:].flatten(1), tiles[..., :1].expand(-1, -1, tiles.shape[2] - 1).flatten(1)
    found = tiles.new_full((tiles.shape[0], rows + 1), -1)  # one more for those that are no row's
    return found.scatter_(1, torch.where(owners < 0, rows, owners), places)[:, :rows].t()


def shrink_twin(x: Tensor, A: Tensor, tiles: Tensor) -> Tensor:
    """The definition of `shrink`, with one part and zeros where a row has no such use."""
    places = places_of(tiles, x.shape[0])
    h = torch.einsum("bi,buiw->ubw", x.float(), A[places.clamp(min=0)].float())
    return (h * (places.t() >= 0).unsqueeze(-1)).unsqueeze(0)


def expand_twin(hidden: Tensor, B: Sequence[Tensor], tiles: Tensor, weights: Tensor, y: Sequence[Tensor]) -> None:
    """The definition of `expand`."""
    places, rank = places_of(tiles, hidden.shape[2]), B[0].shape[1]
    for part, (b, out) in enumerate(zip(B, y)):
        h = hidden.sum(0)[..., part * rank : (part + 1) * rank]
        update = torch.einsum("bu,ubr,buro->bo", weights * (places >= 0), h, b[places.clamp(min=0)].float())
        out.copy_(torch.where(places[:, :1] >= 0, out.float() + update, out.float()))

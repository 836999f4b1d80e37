"""Triton kernels of a decoder block in a served pass: all that lies between its matrix products, adapters included.

A block is x ← x + o(attention(rotate(q, k, v of norm(x)))), then x ← x + down(silu(gate) · up of norm(x)). A kernel takes
what a product of the base gave, adds the adapters' updates to it, does what the block does there, and multiplies the
result by the A's of the products that come next. So adapters cost no launch of their own, only their bytes.

`parts` (N, B, W) are the sums of h = x Aᵀ that the programs of a kernel made of their columns each; an `Update` is what
is made of them. Every row, padding too, is in one tile (`served.tile_rows` of one use), whose place is -1 for those
without an adapter.
The definitions in plain torch are in `served_block_twins`.

Legend: B rows, N parts, P places, R rank, W = targets of a group · R, D width of the residual stream, I width of the
gated activation, H query heads, K key heads, E width of a head, S slots, C context, M rows of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels import served_block_twins as twins
from veneer.kernels.served import Table, _factor, _jit, _power, _runs, _shrunk, _tile, _times, next_parts, tl
from veneer.kernels.served_block_twins import Update

CHUNK, FEW = tl.constexpr(16), tl.constexpr(4)
"""Parts of h that are read at a time, for one row and for several."""
RANKS = tl.constexpr(16)
"""Of a factor's rank, at a time: the least of a product on tensor cores."""
GATED = 256
"""Columns that a program of `gated` takes."""


@_jit
def _summed(hidden, row, rows, W, N: tl.constexpr, M: tl.constexpr):
    """Σ_n of RANKS columns of h (N, rows, W) for the rows (M), some parts at a time."""
    r = tl.arange(0, RANKS)
    if M == 1:
        total = tl.zeros((M, RANKS), tl.float32)
        for start in tl.static_range(0, N, CHUNK):
            n = start + tl.arange(0, CHUNK)
            at = n[:, None] * rows * W + tl.max(row, 0) * W + r[None, :]
            total += tl.sum(tl.load(hidden + at, mask=n[:, None] < N, other=0.0), 0)[None, :]
    else:
        own, each = row[:, None, None] * W, tl.zeros((M, FEW, RANKS), tl.float32)
        for start in tl.static_range(0, N, FEW):
            n = start + tl.arange(0, FEW)
            at = n[None, :, None] * rows * W + own + r[None, None, :]
            each += tl.load(hidden + at, mask=(own >= 0) & (n[None, :, None] < N), other=0.0)
        total = tl.sum(each, 1)
    return total


@_jit
def _updated(y, hidden, B, weights, place, row, o, seen, rows, O, W, R: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BO: tl.constexpr):  # fmt: skip # noqa: E501
    """y (M, BO) float32 plus the update of its columns o, where they are `seen`."""
    weight = tl.load(weights + row, mask=row >= 0, other=0.0)
    total = tl.zeros((M, BO), tl.float32)
    for start in range(0, R, RANKS):
        r = (start + tl.arange(0, RANKS))[:, None]
        b = tl.load(B + (place * R + r) * O + o[None, :], mask=seen[None, :], other=0.0)
        h = _summed(hidden + start, row, rows, W, N, M)
        total = _times(h.to(b.dtype), b, total, M)
    return y + weight[:, None] * total


@_jit
def _both_updated(y, z, hidden, other, B, C, weights, place, row, o, p, seen, rows, O, W, R: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BO: tl.constexpr):  # fmt: skip # noqa: E501
    """y and z, each as `_updated`, of columns o of B and p of C: all is read before the first product."""
    weight = tl.load(weights + row, mask=row >= 0, other=0.0)
    total, sum = tl.zeros((M, BO), tl.float32), tl.zeros((M, BO), tl.float32)
    for start in range(0, R, RANKS):
        r = (start + tl.arange(0, RANKS))[:, None]
        b = tl.load(B + (place * R + r) * O + o[None, :], mask=seen[None, :], other=0.0)
        c = tl.load(C + (place * R + r) * O + p[None, :], mask=seen[None, :], other=0.0)
        h = _summed(hidden + start, row, rows, W, N, M)
        g = _summed(other + start, row, rows, W, N, M)
        total, sum = _times(h.to(b.dtype), b, total, M), _times(g.to(b.dtype), c, sum, M)
    return y + weight[:, None] * total, z + weight[:, None] * sum


@_jit
def _norm(x, y, out, weight, parts, hidden, eps, rows, D, W: tl.constexpr, ADD: tl.constexpr, N: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr):  # fmt: skip # noqa: E501
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    at, inside = row * D + d, d < D
    v = tl.load(x + at, mask=inside, other=0.0)
    scale = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v = (v.to(tl.float32) + tl.load(y + at, mask=inside, other=0.0).to(tl.float32)).to(v.dtype)
        tl.store(x + at, v, mask=inside)
    v = v.to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
    kept = x.dtype.element_ty
    tl.store(out + at, ((v * r).to(kept).to(tl.float32) * scale).to(kept), mask=inside)
    if N:
        for start in range(0, W, BW):
            w = start + tl.arange(0, BW)
            h = tl.zeros((BW,), tl.float32)
            for n in tl.static_range(N):
                h += tl.load(parts + (n * rows + row) * W + w, mask=w < W, other=0.0)
            tl.store(hidden + row * W + w, h * r, mask=w < W)


@_jit
def _add(x, y, tiles, hidden, B, weights, scale, A, parts, rows, D, W, R: tl.constexpr, V: tl.constexpr, ADD: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BV: tl.constexpr, BO: tl.constexpr):  # fmt: skip # noqa: E501
    place, row = _tile(tiles, tl.program_id(1), M)
    if tl.max(row, 0) >= 0:
        there, o = row >= 0, tl.program_id(0) * BO + tl.arange(0, BO)
        at, inside = row[:, None] * D + o[None, :], there[:, None] & (o[None, :] < D)
        v = tl.load(x + at, mask=inside, other=0.0)
        if BV:  # on their way, as all that is read, while y is updated
            a = _factor(A, place, o, 0, D, V, BV)
            s = tl.load(scale + o, mask=o < D, other=0.0).to(tl.float32)
        if ADD:
            u = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            if N:
                if place >= 0:
                    u = _updated(u, hidden, B, weights, place, row, o, o < D, rows, D, W, R, N, M, BO)
            v = (v.to(tl.float32) + u).to(v.dtype)
            tl.store(x + at, v, mask=inside)
        if BV:
            if place >= 0:
                unit = 1.0
                if v.dtype == tl.float16:  # whose range ends before that of x · weight, which is not normed yet
                    unit = tl.maximum(tl.max(tl.abs(s), 0), 1.0)
                    s = s / unit
                scaled = (v.to(tl.float32) * s[None, :]).to(v.dtype)
                _shrunk(scaled, a, A, parts, place, row, tl.program_id(0), o, rows, D, unit, V, M, BV)


@_jit
def _rotate(q, k, v, sq, sk, sv, out, B0, B1, B2, norm_q, norm_k, cos, sin, tiles, hidden, weights, slots, positions, keys, values, eps, rows, W, C, H, K, E, R: tl.constexpr, NORM: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BE: tl.constexpr):  # fmt: skip # noqa: E501
    place, row = _tile(tiles, tl.program_id(1), M)
    if tl.max(row, 0) >= 0:
        head, there = tl.program_id(0), row >= 0
        y, stride, B, norm, to, O, offset = q, sq, B0, norm_q, out, H * E, 0  # noqa: E741
        at = row * O + head * E
        if head >= H:  # a head of k or of v, which goes where its row's slot has room for its position
            head -= H
            y, stride, B, norm, to, O, offset = k, sk, B1, norm_k, keys, K * E, R  # noqa: E741
            if head >= K:
                head -= K
                y, stride, B, to, offset = v, sv, B2, values, 2 * R
            slot = tl.load(slots + row, mask=there, other=0).to(tl.int64)
            at = ((slot * K + head) * C + tl.load(positions + row, mask=there, other=0).to(tl.int64)) * E
        turned = tl.program_id(0) < H + K
        e, half = tl.arange(0, BE), E // 2
        inside = there[:, None] & (e[None, :] < half)
        low, high = head * E + e, head * E + half + e
        a = tl.load(y + row[:, None] * stride + low[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(y + row[:, None] * stride + high[None, :], mask=inside, other=0.0).to(tl.float32)
        turn, seen = row[:, None] * E + e[None, :], inside & turned
        c = tl.load(cos + turn, mask=seen, other=1.0).to(tl.float32)
        s = tl.load(sin + turn, mask=seen, other=0.0).to(tl.float32)
        high_c = tl.load(cos + turn + half, mask=seen, other=1.0).to(tl.float32)
        high_s = tl.load(sin + turn + half, mask=seen, other=0.0).to(tl.float32)
        if N:
            if place >= 0:
                h = hidden + offset
                a, b = _both_updated(
                    a, b, h, h, B, B, weights, place, row, low, high, e < half, rows, O, W, R, N, M, BE
                )
        kept = out.dtype.element_ty  # below, products and sums are spelled out: rounded alike with and without adapters
        if NORM:
            if turned:
                r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / E + eps)[:, None]
                low_n = tl.load(norm + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
                high_n = tl.load(norm + half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
                a, b = (a * r).to(kept).to(tl.float32) * low_n, (b * r).to(kept).to(tl.float32) * high_n
        tl.store(to + at[:, None] + e[None, :], tl.fma(a, c, -(b * s)).to(kept), mask=inside)
        tl.store(to + at[:, None] + half + e[None, :], tl.fma(b, high_c, a * high_s).to(kept), mask=inside)


@_jit
def _gate(gate, up, out, gate_row, up_row, tiles, hidden, B0, B1, weights, A, parts, rows, I, W, R: tl.constexpr, V: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BV: tl.constexpr, BO: tl.constexpr):  # fmt: skip # noqa: E501
    place, row = _tile(tiles, tl.program_id(1), M)
    if tl.max(row, 0) >= 0:
        there, o = row >= 0, tl.program_id(0) * BO + tl.arange(0, BO)
        inside = there[:, None] & (o[None, :] < I)
        g = tl.load(gate + row[:, None] * gate_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row[:, None] * up_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
        if BV:
            a = _factor(A, place, o, 0, I, V, BV)
        if N:
            if place >= 0:
                h = hidden + R
                g, u = _both_updated(g, u, hidden, h, B0, B1, weights, place, row, o, o, o < I, rows, I, W, R, N, M, BO)
        v = (g / (1.0 + tl.exp(-g)) * u).to(gate.dtype.element_ty)
        tl.store(out + row[:, None] * I + o[None, :], v, mask=inside)
        if BV:
            if place >= 0:
                _shrunk(v, a, A, parts, place, row, tl.program_id(0), o, rows, I, 1.0, V, M, BV)


def _warps(tile: int, columns: int) -> int:
    """A power of two. A single row's product with a factor stays in one warp, which sums it without the others."""
    return 1 if tile == 1 else max(1, tile * _power(columns) // 1024)


def _hidden(update: Update | None, x: Tensor, targets: int) -> tuple[Tensor, list[Tensor], int, int, int]:
    """(h, each target's B, W, N, R) of an update; of none, stand-ins and N = 0."""
    if update is None:
        return x, [x] * targets, 0, 0, 16
    rank = update.B[0].shape[1]
    return update.hidden, list(update.B), update.hidden.shape[2], update.hidden.shape[0], rank


def norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, parts: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x (B, D) += y in place, then its RMS norm (B, D), and h (1, B, W) of the normed x from the parts of x · weight."""
    if not _runs(x):
        return twins.norm(x, y, weight, eps, parts)
    (rows, D), out = x.shape, torch.empty_like(x)
    hidden = None if parts is None else parts.new_empty(1, *parts.shape[1:])
    N, W = (0, 0) if parts is None else (parts.shape[0], parts.shape[2])
    BD = _power(D)
    _norm[(rows,)](
        x, x if y is None else y, out, weight, x if parts is None else parts, x if hidden is None else hidden, eps, rows,
        D, W, y is not None, N, max(16, _power(W)), BD, num_warps=8 if BD > 1024 else 4,
    )  # fmt: skip
    return out, hidden


def add(
    x: Tensor, y: Tensor | None, update: Update | None, table: Table, weight: Tensor, A: Tensor | None
) -> Tensor | None:
    """x (B, D) += y + its update, in place; parts of (x · weight) Aᵀ for the products of the norm that follows."""
    if not _runs(x):
        return twins.add(x, y, update, table, weight, A)
    (rows, D), (tiles, weights), M = x.shape, table, table.tiles.shape[1] - 1
    columns = 256 if M == 1 else 128
    blocks = -(-D // columns)
    hidden, B, W, N, R = _hidden(update, x, 1)
    wide, parts, V, BV = next_parts(A, x, blocks, columns, M)
    _add[(blocks, tiles.shape[0])](
        x, x if y is None else y, tiles, hidden, B[0], weights, weight, wide, x if parts is None else parts, rows, D, W,
        R, V, y is not None, N, M, BV, columns, num_warps=_warps(M, columns), num_stages=1,
    )  # fmt: skip
    return parts


def rotate(
    qkv: Sequence[Tensor], update: Update | None, table: Table, norms: Sequence[Tensor] | None, eps: float,
    turn: tuple[Tensor, Tensor], slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """q, k and v plus their updates; q and k normed by head if there are `norms` (E each), and turned → q; k and v are
    written into the cache at their slots and positions.

    q (B, H·E), k and v (B, K·E) may be parts of one matrix; turn = cos and sin (B, E), slots and positions (B), keys and
    values (S, K, C, E).
    """
    q, k, v = qkv
    if not _runs(q):
        return twins.rotate(qkv, update, table, norms, eps, turn, slots, positions, keys, values)
    (tiles, weights), M, (_, K, C, E) = table, table.tiles.shape[1] - 1, keys.shape
    hidden, B, W, N, R = _hidden(update, q, 3)
    H, out = q.shape[1] // E, q.new_empty(q.shape)
    _rotate[(H + 2 * K, tiles.shape[0])](
        q, k, v, *(t.stride(0) for t in qkv), out, *B, *(norms or (q, q)), *turn, tiles, hidden, weights, slots, positions,
        keys, values, eps, q.shape[0], W, C, H, K, E, R, norms is not None, N, M, max(16, _power(E // 2)),
        num_warps=_warps(M, E), num_stages=1,
    )  # fmt: skip
    return out


def gated(
    gate: Tensor, up: Tensor, update: Update | None, table: Table, A: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """silu(gate + its update) · (up + its update), (B, I), and parts of h for the product that follows. gate and up
    (B, I) may be parts of one matrix."""
    if not _runs(gate):
        return twins.gated(gate, up, update, table, A)
    (rows, I), (tiles, weights), M = gate.shape, table, table.tiles.shape[1] - 1
    out, blocks = gate.new_empty(gate.shape), -(-I // GATED)
    hidden, B, W, N, R = _hidden(update, gate, 2)
    wide, parts, V, BV = next_parts(A, gate, blocks, GATED, M)
    _gate[(blocks, tiles.shape[0])](
        gate, up, out, gate.stride(0), up.stride(0), tiles, hidden, *B, weights, wide, gate if parts is None else parts,
        rows, I, W, R, V, N, M, BV, GATED,
        num_warps=_warps(M, GATED) if N or V else 4, num_stages=1,
    )  # fmt: skip
    return out, parts

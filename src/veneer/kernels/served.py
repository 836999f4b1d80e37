"""Triton kernels of a served decoding step: each row's adapters, and attention over slots. All shapes are fixed.

They read what to do (places, slots, positions) from device memory, so that a captured CUDA graph of a step serves any
adapters and any lengths. Their definitions in plain torch are `shrink_twin`, `expand_twin` and `attend_twin`.

Legend: B rows, U uses (adapters a row may stack), I input width, O output width, R rank, W = targets of a group · R,
P places, N splits of a sum, S slots, C context, K key heads, G queries of a key head, D head width.
"""

import os

import torch
from torch import Tensor

try:  # comes with torch's CUDA builds, and without one there is nothing to run this on
    import triton
    import triton.language as tl
except ImportError:
    triton = None

    class tl:  # for the annotations below, which triton wants as they are
        constexpr = int


TILE = 4096
"""Factors that one program holds at a time."""


def _jit(function):
    return function if triton is None else triton.jit(function)


@_jit
def _shrink(x, A, places, hidden, rows, I, W, USES: tl.constexpr, SPLIT: tl.constexpr, BI: tl.constexpr, BW: tl.constexpr):  # fmt: skip # noqa: E501
    entry, split = tl.program_id(0), tl.program_id(1)
    place = tl.load(places + entry).to(tl.int64)
    if place >= 0:
        row = (entry // USES).to(tl.int64)
        w = tl.arange(0, BW)
        total = tl.zeros((BW,), tl.float32)
        for start in range(0, SPLIT, BI):
            i = split * SPLIT + start + tl.arange(0, BI)
            v = tl.load(x + row * I + i, mask=i < I, other=0.0).to(tl.float32)
            inside = (i[:, None] < I) & (w[None, :] < W)
            a = tl.load(A + place * I * W + i[:, None] * W + w[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(v[:, None] * a, 0)
        tl.store(hidden + (split * rows * USES + entry).to(tl.int64) * W + w, total, mask=w < W)


@_jit
def _expand(hidden, B, places, weights, y, rows, O, W, offset, USES: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr, BO: tl.constexpr):  # fmt: skip # noqa: E501
    row, block = tl.program_id(0), tl.program_id(1)
    if tl.load(places + row * USES) >= 0:  # a row's uses come first
        o, r = block * BO + tl.arange(0, BO), tl.arange(0, R)
        total = tl.zeros((BO,), tl.float32)
        for use in range(USES):
            entry = row * USES + use
            place = tl.load(places + entry).to(tl.int64)
            if place >= 0:
                h = tl.zeros((R,), tl.float32)
                for split in range(SPLITS):
                    h += tl.load(hidden + (split * rows * USES + entry).to(tl.int64) * W + offset + r)
                at = B + place * R * O + r[:, None] * O + o[None, :]
                b = tl.load(at, mask=o[None, :] < O, other=0.0).to(tl.float32)
                total += tl.load(weights + entry) * tl.sum(h[:, None] * b, 0)
        out = y + row.to(tl.int64) * O + o
        before = tl.load(out, mask=o < O, other=0.0).to(tl.float32)
        tl.store(out, (before + total).to(y.dtype.element_ty), mask=o < O)


@_jit
def _attend(q, keys, values, slots, positions, part, weight, scale, window, rows, C, K, G, D, SPLIT: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr):  # fmt: skip # noqa: E501
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, length = tl.load(slots + row).to(tl.int64), tl.load(positions + row).to(tl.int32) + 1
    first = tl.maximum(split * SPLIT, length - window)
    last = tl.minimum(split * SPLIT + SPLIT, length)
    g, d = tl.arange(0, BG), tl.arange(0, BD)
    out = (row * K + head) * SPLITS + split
    best = tl.full((BG,), float("-inf"), tl.float32)
    mass = tl.zeros((BG,), tl.float32)
    total = tl.zeros((BG, BD), tl.float32)
    if first < last:
        inside = (g[:, None] < G) & (d[None, :] < D)
        query = tl.load(q + ((row * K + head) * G + g[:, None]) * D + d[None, :], mask=inside, other=0.0)
        for start in range(0, SPLIT, BN):
            n = split * SPLIT + start + tl.arange(0, BN)
            at = ((slot * K + head) * C + n[:, None]) * D + d[None, :]
            there = (n >= first) & (n < last)
            seen = there[:, None] & (d[None, :] < D)
            k = tl.load(keys + at, mask=seen, other=0.0)
            score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            score = tl.where(there[None, :], score, float("-inf"))
            new = tl.maximum(best, tl.max(score, 1))
            base = tl.where(new > float("-inf"), new, 0.0)  # nothing seen yet: no -inf less -inf
            p = tl.exp(score - base[:, None])
            keep = tl.exp(best - base)
            mass = mass * keep + tl.sum(p, 1)
            v = tl.load(values + at, mask=seen, other=0.0)
            total = total * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            best = new
        total = total / mass[:, None]
        tl.store(part + (out * G + g[:, None]) * D + d[None, :], total, mask=inside)
        best = best + tl.log(mass)
    tl.store(weight + out * G + g, best, mask=g < G)


@_jit
def _gather(part, weight, y, G, D, SPLITS: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr):
    head, g = tl.program_id(0), tl.program_id(1)  # head counts rows and key heads
    s, d = tl.arange(0, BS), tl.arange(0, BD)
    share = tl.load(weight + (head * SPLITS + s) * G + g, mask=s < SPLITS, other=float("-inf"))
    share = tl.exp(share - tl.max(share, 0))
    used = (share[:, None] > 0) & (d[None, :] < D)
    parts = tl.load(part + ((head * SPLITS + s[:, None]) * G + g) * D + d[None, :], mask=used, other=0.0)
    total = tl.sum(parts * share[:, None], 0) / tl.sum(share, 0)
    tl.store(y + (head * G + g) * D + d, total.to(y.dtype.element_ty), mask=d < D)


def _runs(x: Tensor) -> bool:
    """Whether the kernels can run on a tensor; their twins can everywhere."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def splits(width: int, other: int) -> int:
    """Into how many parts a shrink's sum over `width` inputs is cut, for `other` outputs: a few tiles for each."""
    return min(16, _power(-(-width * _power(other) // (8 * TILE))))


def shrink(x: Tensor, A: Tensor, places: Tensor) -> Tensor:
    """h[n,b·U+u,w] = Σ_{i in part n} x[b,i] A[places[b,u],i,w]: x (B, I), A (P, I, W), places (B, U) → (N, B·U, W) float32.

    Entries with place -1 are left as they are: nothing reads them.
    """
    if not _runs(x):
        return shrink_twin(x, A, places)
    (rows, width), (_, _, W), uses = x.shape, A.shape, places.shape[1]
    parts, BW = splits(width, W), _power(W)
    BI = max(16, TILE // BW)
    each = -(-width // (parts * BI)) * BI
    hidden = torch.empty(parts, rows * uses, W, dtype=torch.float32, device=x.device)
    _shrink[(rows * uses, parts)](x, A, places, hidden, rows, width, W, uses, each, BI, BW)
    return hidden


def expand(hidden: Tensor, B: Tensor, places: Tensor, weights: Tensor, offset: int, y: Tensor) -> None:
    """y[b,o] += Σ_u weights[b,u] Σ_r (Σ_n h[n,b·U+u,offset+r]) B[places[b,u],r,o], in place; not where places are -1.

    hidden (N, B·U, W) float32, B (P, R, O), places (B, U) with the used ones first, weights (B, U) float32, y (B, O).
    R is a power of two.
    """
    if not _runs(y):
        return expand_twin(hidden, B, places, weights, offset, y)
    (parts, _, W), (_, rank, width), (rows, uses) = hidden.shape, B.shape, places.shape
    BO = max(32, TILE // 2 // rank)
    grid = (rows, -(-width // BO))
    _expand[grid](hidden, B, places, weights, y, rows, width, W, offset, uses, parts, rank, BO)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """One query a row over its slot's first positions+1 keys (its last `window` of them).

    q (B, K, G, D), keys and values (S, K, C, D), slots and positions (B) → (B, K, G, D).
    """
    if not _runs(q):
        return attend_twin(q, keys, values, slots, positions, scale, window)
    (rows, K, G, D), C = q.shape, keys.shape[2]
    each = max(64, -(-C // 16 // 64) * 64)
    parts = -(-C // each)
    part = torch.empty(rows, K, parts, G, D, dtype=torch.float32, device=q.device)
    weight = torch.empty(rows, K, parts, G, dtype=torch.float32, device=q.device)
    out, BD = torch.empty_like(q), max(16, _power(D))
    _attend[(rows, K, parts)](
        q, keys, values, slots, positions, part, weight, scale, C if window is None else window,
        rows, C, K, G, D, each, parts, 64, max(16, _power(G)), BD,
    )  # fmt: skip
    _gather[(rows * K, G)](part, weight, out, G, D, parts, max(2, _power(parts)), BD)
    return out


def shrink_twin(x: Tensor, A: Tensor, places: Tensor) -> Tensor:
    """The definition of `shrink`, with one part and zeros where the place is -1."""
    h = torch.einsum("bi,buiw->buw", x.float(), A[places.clamp(min=0)].float())
    return (h * (places >= 0).unsqueeze(-1)).flatten(0, 1).unsqueeze(0)


def expand_twin(hidden: Tensor, B: Tensor, places: Tensor, weights: Tensor, offset: int, y: Tensor) -> None:
    """The definition of `expand`."""
    h = hidden.sum(0).unflatten(0, places.shape)[..., offset : offset + B.shape[1]]
    update = torch.einsum("bu,bur,buro->bo", weights * (places >= 0), h, B[places.clamp(min=0)].float())
    y.copy_(torch.where(places[:, :1] >= 0, y.float() + update, y.float()))


def attend_twin(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """The definition of `attend`."""
    k, v = keys[slots].float(), values[slots].float()
    n, at = torch.arange(keys.shape[2], device=q.device), positions.unsqueeze(1)
    unseen = n > at if window is None else (n > at) | (n <= at - window)
    scores = torch.einsum("bkgd,bkcd->bkgc", q.float(), k) * scale
    return torch.einsum("bkgc,bkcd->bkgd", scores.masked_fill(unseen[:, None, None], float("-inf")).softmax(-1), v).to(
        q
    )

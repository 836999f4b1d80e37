"""The definitions of `served_block`, in plain torch: float32 between what is read and what is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.served import Table, places_of, twin_parts


class Update(NamedTuple):
    """h (N, B, W) float32, to be summed over N, and each target's B (P, R, O): y += w Σ_r h_r B[p, r] of its part of W."""

    hidden: Tensor
    B: Sequence[Tensor]


def _updated(y: Tensor, update: Update | None, table: Table, part: int = 0) -> Tensor:
    """y (B, O) in float32 with its update."""
    if update is None:
        return y.float()
    places, B = places_of(table.tiles[None], len(y))[:, 0], update.B[part]
    rank = B.shape[1]
    h = update.hidden.sum(0)[:, part * rank : (part + 1) * rank].to(B.dtype).float()
    own = torch.einsum("br,bro->bo", h, B[places.clamp(min=0)].float()) * table.weights
    return torch.where((places >= 0)[:, None], y.float() + own, y.float())


def _rms(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (…, D) normed, in float32, and 1/rms (…, 1)."""
    r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (x.float() * r).to(dtype).float() * weight.float(), r


def norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, parts: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See `served_block.norm`."""
    if y is not None:
        x.copy_(x.float() + y.float())
    out, r = _rms(x, weight, eps, x.dtype)
    return out.to(x.dtype), None if parts is None else parts.sum(0, keepdim=True) * r


def add(
    x: Tensor, y: Tensor | None, update: Update | None, table: Table, weight: Tensor, A: Tensor | None
) -> Tensor | None:
    """See `served_block.add`."""
    if y is not None:
        x.copy_(x.float() + _updated(y, update, table))
    scaled = x.float() * weight.float()
    return twin_parts(scaled if x.dtype == torch.float16 else scaled.to(x.dtype), A, table)


def rotate(
    qkv: Sequence[Tensor], update: Update | None, table: Table, norms: Sequence[Tensor] | None, eps: float,
    turn: tuple[Tensor, Tensor], slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """See `served_block.rotate`."""
    (_, K, _, E), dtype = keys.shape, qkv[0].dtype
    q, k, v = (_updated(y, update, table, n).unflatten(1, (-1, E)) for n, y in enumerate(qkv))
    if norms is not None:
        q, k = (_rms(y, weight, eps, dtype)[0] for y, weight in zip((q, k), norms))
    cos, sin = (t.float().unsqueeze(1) for t in turn)
    q, k = (y * cos + torch.cat([-y[..., E // 2 :], y[..., : E // 2]], -1) * sin for y in (q, k))
    head = torch.arange(K, device=slots.device)
    for store, y in ((keys, k), (values, v)):
        store[slots[:, None], head, positions[:, None]] = y.to(dtype)
    return q.flatten(1).to(dtype)


def gated(
    gate: Tensor, up: Tensor, update: Update | None, table: Table, A: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See `served_block.gated`."""
    out = (F.silu(_updated(gate, update, table)) * _updated(up, update, table, 1)).to(gate.dtype)
    return out, twin_parts(out, A, table)

"""Attention over packed rows: segments that see themselves and their shared prefix, and no dense mask.

The maths of one segment is softmax(q Kᵀ·scale + causal) V over the keys of its prefix and its own; cost and memory
grow with Σ length² of the sequences and not with the row's length squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_mask(length: int, prefix: int, window: int | None, device: torch.device) -> Tensor:
    """(length, prefix + length) bool: query t sees all keys up to its own, within the last `window` if given."""
    query = torch.arange(prefix, prefix + length, device=device).unsqueeze(-1)
    key = torch.arange(prefix + length, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[tuple[int, int, int, int]],
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """query (1, H, T, D), key and value (1, K, T, D) with H a multiple of K → (1, T, H, D).

    `segments` are (start, end, prefix_start, prefix_end) and cover the row in order; a prefix is a whole segment.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    # split, not slices: its backward is one concatenation, a slice's is a zero tensor of the whole row for each.
    lengths = [end - start for start, end, _, _ in segments]
    queries, keys, values = (t.split(lengths, dim=2) for t in (query, key, value))
    number = {start: n for n, (start, *_) in enumerate(segments)}
    parts = []
    for q, k, v, (_, _, prefix_start, prefix_end) in zip(queries, keys, values, segments):
        length, prefix = q.shape[2], prefix_end - prefix_start
        if prefix:
            k, v = (torch.cat([t[number[prefix_start]], own], dim=2) for t, own in ((keys, k), (values, v)))
        plain = not prefix and (window is None or length <= window)
        mask = None if plain else segment_mask(length, prefix, window, query.device)
        parts.append(F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=plain, scale=scale))
    return torch.cat(parts, dim=2).transpose(1, 2)


def dense_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[tuple[int, int, int, int]],
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The definition of `packed_attention`: one dense (T, T) mask, plain softmax."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    length = query.shape[2]
    mask = torch.zeros(length, length, dtype=torch.bool, device=query.device)
    for start, end, prefix_start, prefix_end in segments:
        own = segment_mask(end - start, prefix_end - prefix_start, window, query.device)
        mask[start:end, prefix_start:prefix_end] = own[:, : prefix_end - prefix_start]
        mask[start:end, start:end] = own[:, prefix_end - prefix_start :]
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2)


@dataclass(frozen=True)
class Layout:
    """Where the segments of a packed row of T tokens lie, as the GPU kernels want it.

    cu_q and cu_k (N+1, int32) are cumulative lengths of queries and keys by segment; `keys` (int64) lists for each key
    of each segment its place in the row, or is None where every segment's keys are its own tokens. `longest_q` and
    `longest_k` bound the lengths. `equal`, if not 0, is the length that all segments have.
    """

    cu_q: Tensor
    cu_k: Tensor
    keys: Tensor | None
    longest_q: int
    longest_k: int
    equal: int

    @classmethod
    def of(cls, segments: Sequence[tuple[int, int, int, int]], device: torch.device) -> Layout:
        """From segments (start, end, prefix_start, prefix_end) that cover the row in order."""
        own = [end - start for start, end, _, _ in segments]
        prefixes = [end - start for _, _, start, end in segments]
        size = max(16, 1 << len(own).bit_length())  # few different sizes, so that compiled code is used again
        cu_q, cu_k = (
            torch.tensor(list(accumulate(lengths, initial=0)) + [sum(lengths)] * (size - len(own)), dtype=torch.int32)
            for lengths in (own, [o + p for o, p in zip(own, prefixes)])
        )
        keys = None
        if any(prefixes):
            parts = [torch.cat([torch.arange(ps, pe), torch.arange(s, e)]) for s, e, ps, pe in segments]
            keys = torch.cat(parts).to(device, non_blocking=True)
        longest = [1 << (max(lengths) - 1).bit_length() for lengths in (own, [o + p for o, p in zip(own, prefixes)])]
        equal = own[0] if keys is None and len(set(own)) == 1 else 0
        return cls(cu_q.to(device, non_blocking=True), cu_k.to(device, non_blocking=True), keys, *longest, equal)


def has_varlen() -> bool:
    """Whether this torch has attention over rows of several lengths."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in signature(varlen_attn).parameters


def layout_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = None, window: int | None = None
) -> Tensor:
    """`packed_attention` on a GPU, in half precision: memory and work as there, in one kernel for all segments.

    query (1, H, T, D), key and value (1, K, T, D) → (1, T, H, D).
    """
    groups = query.shape[1] // key.shape[1]
    if layout.equal and (window is None or window >= layout.equal):  # a plain batch: torch's fastest kernel takes it
        q, k, v = (t[0].unflatten(1, (-1, layout.equal)).transpose(0, 1) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1)
        return out.transpose(1, 2).flatten(0, 1).unsqueeze(0)
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if layout.keys is not None:
        k, v = k.index_select(0, layout.keys), v.index_select(0, layout.keys)
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    left = -1 if window is None else window - 1
    out = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), layout.cu_q, layout.cu_k, layout.longest_q, layout.longest_k,
        scale=scale, window_size=(left, 0),
    )  # fmt: skip
    return out.unsqueeze(0)

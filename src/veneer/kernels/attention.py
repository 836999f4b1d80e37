"""Attention over packed rows: segments that see themselves and their shared prefix, and no dense mask.

The maths of one segment is softmax(q Kᵀ·scale + causal) V over the keys of its prefix and its own; cost and memory
grow with Σ length² of the sequences and not with the row's length squared.
"""

from __future__ import annotations

from collections.abc import Sequence

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

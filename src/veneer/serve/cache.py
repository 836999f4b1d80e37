"""Keys and values in slots, one for each running request, and attention of packed tokens over them.

Legend: L layers, S slots, C context, H query heads, K key heads, G = H/K, D head width, T tokens, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from veneer.errors import BaseModelError
from veneer.kernels.attention import segment_mask

ATTENTION = "veneer_served"


class SlotCache:
    """`store` (L, 2, S, K, C, D): each slot's keys and values from its first token on."""

    def __init__(self, layers: int, slots: int, context: int, heads: int, width: int, dtype, device) -> None:
        # zeros, not empty: what is masked out is multiplied by zero, and NaN would survive that
        self.store = torch.zeros(layers, 2, slots, heads, context, width, dtype=dtype, device=device)
        self.context = context

    def where(self, slots: Tensor, positions: Tensor) -> Tensor:
        """slots, positions (T) → (K·T): each head's and token's place in a layer's keys, as rows of width D."""
        heads, context = self.store.shape[3:5]
        first = torch.arange(heads, device=slots.device).unsqueeze(1)
        return ((slots * heads + first) * context + positions).flatten()

    def write(self, layer: int, where: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value (1, K, T, D) to the places `where` (K·T)."""
        for n, part in enumerate((key, value)):
            self.store[layer, n].view(-1, self.store.shape[-1]).index_copy_(0, where, part.reshape(-1, part.shape[-1]))

    def clean(self, slot: int, length: int) -> bool:
        """Whether the first tokens of a slot are finite. If not, the slot is emptied: rows read beyond their own tokens,
        times zero, and a NaN that lay there would be in the answers of those that come after."""
        kept = self.store[:, :, slot, :, :length]
        if not length or all(bound.isfinite() for bound in kept.aminmax()):
            return True
        self.store[:, :, slot].zero_()
        return False

    def copy(self, source: int, target: int, length: int) -> None:
        """The first tokens of one slot to another."""
        self.store[:, :, target, :, :length].copy_(self.store[:, :, source, :, :length])


class Prompts:
    """Pieces of prompts, one after another in one row: (slot, first position, tokens) each sees its slot's past."""

    def __init__(self, cache: SlotCache, pieces: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        self.cache, self.pieces = cache, pieces
        self.positions = torch.cat([torch.arange(first, first + count) for _, first, count in pieces]).to(device)
        slots = torch.cat([torch.full((count,), slot) for slot, _, count in pieces]).to(device)
        self.where = cache.where(slots, self.positions)

    def attend(self, layer: int, query: Tensor, scale: float | None, window: int | None) -> Tensor:
        """query (1, H, T, D) → (1, T, H, D)."""
        parts, start = [], 0
        for slot, first, count in self.pieces:
            q, end = query[:, :, start : start + count], first + count
            k, v = (kv[:, :end].unsqueeze(0) for kv in self.cache.store[layer, :, slot])
            plain = first == 0 and (window is None or count <= window)
            mask = None if plain else segment_mask(count, first, window, query.device)
            gqa = k.shape[1] != q.shape[1]
            if gqa and mask is not None and k.is_cuda:  # its quick kernels take a mask, or groups, and not both
                k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
                gqa = False
            parts.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=scale, enable_gqa=gqa))
            start += count
        return torch.cat(parts, dim=2).transpose(1, 2)


class Tokens:
    """One new token for each row, (slot, position) in ascending order of slots.

    Rows of neighbouring slots attend in one product over views of the cache, up to the longest of them, with a mask.
    """

    def __init__(self, cache: SlotCache, rows: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.cache = cache
        slots, positions = (torch.tensor(part, device=device) for part in zip(*rows))
        self.positions, self.where = positions, cache.where(slots, positions)
        self.runs: list[list[int]] = []
        for n, (slot, position) in enumerate(rows):
            if self.runs and self.runs[-1][2] + n - self.runs[-1][0] == slot:
                self.runs[-1][1], self.runs[-1][3] = n + 1, max(self.runs[-1][3], position + 1)
            else:
                self.runs.append([n, n + 1, slot, position + 1])
        self.masks: dict[int | None, list[Tensor]] = {}

    def attend(self, layer: int, query: Tensor, scale: float | None, window: int | None) -> Tensor:
        """query (1, H, B, D) → (1, B, H, D)."""
        heads = self.cache.store.shape[3]
        query = query[0].transpose(0, 1).unflatten(1, (heads, -1))  # (B, K, G, D): a key head's queries are its tokens
        if window not in self.masks:
            self.masks[window] = [self._mask(run, window, query) for run in self.runs]
        parts = []
        for (start, end, slot, reach), mask in zip(self.runs, self.masks[window]):
            kv = self.cache.store[layer, :, slot : slot + end - start, :, :reach]
            parts.append(F.scaled_dot_product_attention(query[start:end], kv[0], kv[1], mask, scale=scale))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.flatten(1, 2).unsqueeze(0)

    def _mask(self, run: list[int], window: int | None, query: Tensor) -> Tensor:
        """(B', 1, G, reach), 0 where a row sees a key and -inf elsewhere."""
        start, end, _, reach = run
        key, position = torch.arange(reach, device=query.device), self.positions[start:end].unsqueeze(1)
        unseen = key > position if window is None else (key > position) | (key <= position - window)
        mask = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device).masked_fill_(unseen, float("-inf"))
        return mask[:, None, None].expand(-1, -1, query.shape[2], -1)


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **extra):
    """Attention over slots behind transformers' attention interface; the batch comes as `veneer_batch`."""
    batch = extra.get("veneer_batch")
    if batch is None:
        raise BaseModelError("this model does not hand its attention what it is called with")
    if extra.get("softcap") is not None or extra.get("s_aux") is not None:
        raise BaseModelError("this model's attention has soft-caps or sinks, which the engine does not have")
    batch.cache.write(module.layer_idx, batch.where, key, value)
    return batch.attend(module.layer_idx, query, scaling, sliding_window), None


AttentionInterface.register(ATTENTION, _attention)

"""Choosing tokens: each row by its own rules and its own generator, whatever its neighbours do."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.serve.request import Sampling, TokenLogprob

CANDIDATES = 256
"""How many of the most likely tokens are sorted at first where top_p or top_k cuts; all of them if those do not do."""
COLDEST = 1e-6
"""Below this temperature is no difference, but that logits divided by it would leave float32."""


def generator(seed: int | None) -> random.Random:
    """Draws of one answer. Python seeds with |seed|, which would make those of -1 and 1 the same."""
    return random.Random(random.getrandbits(64) if seed is None else seed if seed >= 0 else str(seed))


def choose(logits: Tensor, sampling: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """logits (N, V) float32, a draw in [0, 1) for each row → chosen tokens (N) int64.

    Greedy rows take the largest logit. Others sample softmax(logits/temperature) cut to the top_k most likely and to
    the smallest set whose probability reaches top_p, by inverting its cumulative distribution at the draw.
    """
    chosen = logits.argmax(-1)
    free = [n for n, s in enumerate(sampling) if s.temperature > 0 and s.top_p >= 1 and s.top_k <= 0]
    cut = [n for n, s in enumerate(sampling) if s.temperature > 0 and (s.top_p < 1 or s.top_k > 0)]
    for rows, sample in ((free, _sample_all), (cut, _sample_cut)):
        if rows:
            where = torch.tensor(rows, device=logits.device)
            heat = torch.tensor([max(sampling[n].temperature, COLDEST) for n in rows], device=logits.device)
            draw = torch.tensor([draws[n] for n in rows], device=logits.device).unsqueeze(1)
            chosen[where] = sample(logits[where] / heat.unsqueeze(1), [sampling[n] for n in rows], draw)
    return chosen


def _invert(p: Tensor, draw: Tensor) -> Tensor:
    """The first index at which the cumulative sum of p (N, V) exceeds draw·Σp."""
    total = p.cumsum(-1)
    at = torch.searchsorted(total, draw * total[:, -1:], right=True).squeeze(1)
    return torch.minimum(at, (p > 0).long().mul_(torch.arange(p.shape[1], device=p.device)).amax(-1))


def _sample_all(scores: Tensor, sampling: Sequence[Sampling], draw: Tensor) -> Tensor:
    return _invert(scores.softmax(-1), draw)


def _sample_cut(scores: Tensor, sampling: Sequence[Sampling], draw: Tensor) -> Tensor:
    top_p = torch.tensor([s.top_p for s in sampling], device=scores.device).unsqueeze(1)
    top_k = torch.tensor(
        [s.top_k if s.top_k > 0 else scores.shape[1] for s in sampling], device=scores.device
    ).unsqueeze(1)
    norm = scores.logsumexp(-1, keepdim=True)
    for count in (min(CANDIDATES, scores.shape[1]), scores.shape[1]):
        best, index = scores.topk(count, -1)
        p = (best - norm).exp()
        enough = (p.sum(-1, keepdim=True) >= top_p) & (top_p < 1) & (top_k >= scores.shape[1])
        if count == scores.shape[1] or bool((enough | (top_k <= count)).all()):
            break
    p = p.where(torch.arange(count, device=p.device) < top_k, 0)
    total = p.sum(-1, keepdim=True).where(top_k < scores.shape[1], 1)  # top_p is a share of what top_k leaves
    kept = p.where((p / total).cumsum(-1) - p / total < top_p, 0)
    return index.gather(1, _invert(kept, draw).unsqueeze(1)).squeeze(1)


def logprobs(logits: Tensor, chosen: Tensor, counts: Sequence[int | None]) -> list[TokenLogprob | None]:
    """log softmax(logits) of the chosen tokens, with `counts[n]` alternatives; None where it is not asked for."""
    rows = [n for n, count in enumerate(counts) if count is not None]
    found: list[TokenLogprob | None] = [None] * len(counts)
    if not rows:
        return found
    where = torch.tensor(rows, device=logits.device)
    scores, tokens = logits[where].log_softmax(-1), chosen[where]
    best, index = scores.topk(min(max(max(counts[n] for n in rows), 1), scores.shape[1]), -1)
    own = scores.gather(1, tokens.unsqueeze(1)).squeeze(1)
    for n, token, value, values, ids in zip(rows, *(t.tolist() for t in (tokens, own, best, index))):
        found[n] = TokenLogprob(token, value, tuple(zip(ids, values))[: counts[n]])
    return found

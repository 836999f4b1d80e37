"""Put several sequences in one row without padding and without seeing each other, computing shared prefixes once.

A row is a run of segments. A segment attends to itself, causally, and to one earlier segment of the row, its prefix,
if it has one. As no token of a causal model sees a later one, the hidden states of a shared prefix are the same for
every example that begins with it, and the gradients that reach them add up: the result is exactly that of separate
sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from veneer.data.example import TokenizedExample

MIN_PREFIX = 8
"""Shorter shared prefixes are not worth a segment of their own."""


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of a row, whose prefix is tokens [prefix_start, prefix_end) (empty if equal)."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True)
class Row:
    """One packed row of T tokens.

    input_ids, position_ids (T, int64); `predictors` (N, int64) are the places whose hidden state predicts `targets`
    (N, int64). A predictor may occur several times, where examples part right after a shared prefix.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    predictors: np.ndarray
    targets: np.ndarray
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Group:
    """Examples that share their first `prefix` tokens, none of them supervised."""

    examples: tuple[TokenizedExample, ...]
    prefix: int

    @property
    def tokens(self) -> int:
        """Tokens that a row needs for the group."""
        return self.prefix + sum(len(e.input_ids) - self.prefix for e in self.examples)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two sequences share."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def group_by_prefix(examples: Sequence[TokenizedExample]) -> list[Group]:
    """Partition examples so that sharing prefixes saves the most tokens.

    Sorted by tokens, an optimal group is a contiguous run, so a dynamic programme over the sorted list finds the best
    partition. A prefix ends before an example's first supervised token and leaves it at least one token of its own.
    """
    ordered = sorted(examples, key=lambda e: e.input_ids.tolist())
    n = len(ordered)
    cap = [min(_first_supervised(e), len(e.input_ids) - 1) for e in ordered]
    step = [common_prefix(ordered[i].input_ids, ordered[i + 1].input_ids) for i in range(n - 1)]
    best, cut = [0] * (n + 1), [0] * (n + 1)
    prefix_of: dict[tuple[int, int], int] = {}
    for i in range(n):  # best[i+1]: most tokens saved among the first i+1 examples
        best[i + 1], cut[i + 1] = best[i], i
        shared = cap[i]
        for j in range(i - 1, -1, -1):
            shared = min(shared, step[j], cap[j])
            if shared < MIN_PREFIX:
                break
            prefix_of[j, i] = shared
            saved = best[j] + (i - j) * shared
            if saved > best[i + 1]:
                best[i + 1], cut[i + 1] = saved, j
    groups, end = [], n
    while end:
        start = cut[end]
        groups.append(Group(tuple(ordered[start:end]), prefix_of.get((start, end - 1), 0)))
        end = start
    return groups[::-1]


def _first_supervised(example: TokenizedExample) -> int:
    where = np.flatnonzero(example.supervised)
    return int(where[0]) if len(where) else len(example.input_ids)


def _split_group(group: Group, max_tokens: int) -> list[Group]:
    """Cut a group that is larger than a row into groups that fit; each repeats the prefix."""
    parts: list[list[TokenizedExample]] = [[]]
    room = max_tokens - group.prefix
    for example in group.examples:
        own = len(example.input_ids) - group.prefix
        if parts[-1] and own > room:
            parts.append([])
            room = max_tokens - group.prefix
        parts[-1].append(example)
        room -= own
    return [Group(tuple(p), group.prefix if len(p) > 1 else 0) for p in parts]


def pack(
    examples: Sequence[TokenizedExample], max_tokens: int, *, packing: bool = True, share_prefix: bool = True
) -> list[Row]:
    """Rows of at most `max_tokens` tokens (more only where one example alone is longer), by first fit decreasing.

    Without `packing`, each example has a row of its own.
    """
    if not packing:
        return [make_row([Group((example,), 0)]) for example in examples]
    groups = group_by_prefix(examples) if share_prefix else [Group((e,), 0) for e in examples]
    pieces = [piece for group in groups for piece in _split_group(group, max_tokens)]
    bins: list[tuple[int, list[Group]]] = []
    for piece in sorted(pieces, key=lambda g: -g.tokens):
        fit = next((k for k, (used, _) in enumerate(bins) if used + piece.tokens <= max_tokens), None)
        if fit is None:
            bins.append((piece.tokens, [piece]))
        else:
            bins[fit] = (bins[fit][0] + piece.tokens, [*bins[fit][1], piece])
    return [make_row(groups) for _, groups in bins]


def make_row(groups: Sequence[Group]) -> Row:
    """Lay groups out in one row: each group's prefix, then each example's remainder."""
    ids, positions, predictors, targets, segments = [], [], [], [], []
    at = 0
    for group in groups:
        p, prefix_at = group.prefix, at
        if p:
            ids.append(group.examples[0].input_ids[:p])
            positions.append(np.arange(p))
            segments.append(Segment(at, at + p))
            at += p
        for example in group.examples:
            tail = example.input_ids[p:]
            ids.append(tail)
            positions.append(np.arange(p, p + len(tail)))
            segments.append(Segment(at, at + len(tail), prefix_at, prefix_at + p))
            wanted = np.flatnonzero(example.supervised[p:])
            wanted = wanted[wanted + p > 0]  # the very first token has nothing before it to predict it
            before = wanted - 1 + at
            predictors.append(np.where(wanted == 0, prefix_at + p - 1, before))
            targets.append(tail[wanted])
            at += len(tail)
    joined = [np.concatenate(part).astype(np.int64) for part in (ids, positions, predictors, targets)]
    return Row(*joined, tuple(segments))


def join(rows: Sequence[Row]) -> Row:
    """Rows one after the other in one row; their sequences do not see each other."""
    starts = np.cumsum([0, *(len(row.input_ids) for row in rows)])
    segments = [
        Segment(s.start + at, s.end + at, s.prefix_start + at, s.prefix_end + at)
        for row, at in zip(rows, starts.tolist())
        for s in row.segments
    ]
    return Row(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.position_ids for row in rows]),
        np.concatenate([row.predictors + at for row, at in zip(rows, starts)]),
        np.concatenate([row.targets for row in rows]),
        tuple(segments),
    )

"""Score answers against references: pure functions over text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class JsonScores:
    """Rates in 0 … 1 over `n` answers.

    `valid_json`: parses as one JSON object; `exact_match`: equals the reference, types included; `field_f1`: by field,
    2·tp/(2·tp + fp + fn), where a right value is a tp, a wrong one an fp and an fn, an extra one an fp, a missing one
    an fn.
    """

    n: int
    valid_json: float
    exact_match: float
    field_f1: dict[str, float]
    field_f1_mean: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TextScores:
    """Share of answers that equal the reference, surrounding white space aside."""

    n: int
    exact_match: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_object(text: str) -> dict[str, Any] | None:
    """A strict JSON object (no NaN, no key twice), or None."""

    def refuse(value: str) -> None:
        raise ValueError(value)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        value = json.loads(text.strip(), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def same(a: Any, b: Any) -> bool:
    """JSON equality: true is not 1; 1 is 1.0; objects by key."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def is_json_task(references: Sequence[str]) -> bool:
    """Whether every reference is a JSON object."""
    return bool(references) and all(parse_object(r) is not None for r in references)


def score_json(predictions: Sequence[str], references: Sequence[str]) -> JsonScores:
    """Compare answers with references that are JSON objects. ValueError if the lengths differ or a reference is none."""
    wanted = [parse_object(r) for r in references]
    if len(predictions) != len(references) or any(w is None for w in wanted):
        raise ValueError("one reference per prediction is needed, each a JSON object")
    found = [parse_object(p) for p in predictions]
    tally: dict[str, list[int]] = {}
    for f, w in zip(found, wanted):
        for name in {**w, **(f or {})}:
            right = f is not None and name in f and name in w and same(f[name], w[name])
            counts = tally.setdefault(name, [0, 0, 0])
            counts[0] += right
            counts[1] += f is not None and name in f and not right
            counts[2] += name in w and not right
    names = sorted({name for w in wanted for name in w})  # invented fields show in validity and exact match
    f1 = {name: 2 * tp / (2 * tp + fp + fn) for name in names for tp, fp, fn in [tally[name]]}
    n = len(references)
    return JsonScores(
        n=n,
        valid_json=sum(f is not None for f in found) / max(1, n),
        exact_match=sum(f is not None and same(f, w) for f, w in zip(found, wanted)) / max(1, n),
        field_f1=f1,
        field_f1_mean=sum(f1.values()) / max(1, len(f1)),
    )


def score_text(predictions: Sequence[str], references: Sequence[str]) -> TextScores:
    """Compare answers with references as text."""
    if len(predictions) != len(references):
        raise ValueError("one reference per prediction is needed")
    right = sum(p.strip() == r.strip() for p, r in zip(predictions, references))
    return TextScores(len(references), right / max(1, len(references)))

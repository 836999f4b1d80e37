"""Which settings a sweep tries: a grid, random draws, and the rungs of successive halving."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import dataclass
from typing import Any

import yaml

from veneer.errors import ConfigError

Space = dict[str, "list[Any] | Range"]
"""Configuration key → the values to try, or a range to draw from."""
RANGE = re.compile(r"(.+?)\.\.(.+)")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, drawn evenly by their logarithm where the two are ten times apart or more."""

    low: float
    high: float
    whole: bool

    def draw(self, rng: random.Random) -> float | int:
        """One number."""
        if self.low > 0 and self.high / self.low > 10 - 1e-9:  # 3e-4 / 3e-5 is 9.999999999999998
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        elif self.whole:
            return rng.randint(int(self.low), int(self.high))
        else:
            value = rng.uniform(self.low, self.high)
        value = round(value) if self.whole else float(f"{value:.4g}")
        return min(max(value, type(value)(self.low)), type(value)(self.high))


def parse_space(settings: list[str]) -> tuple[dict[str, Any], Space]:
    """`--set` texts → (fixed settings, what is searched): "adapter.rank=4,16", "train.lr=1e-5..1e-3", "seed=3".

    Values are YAML; a comma inside brackets or quotes belongs to a value. Raises `ConfigError`.
    """
    fixed: dict[str, Any] = {}
    space: Space = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key or not text:
            raise ConfigError(f"--set takes KEY=VALUE or KEY=VALUE,VALUE,…, such as adapter.rank=4,16, not {setting!r}")
        if key in fixed or key in space:
            raise ConfigError(f"--set {key} is given twice: put its values behind one another, separated by commas")
        parts = [_value(key, part) for part in split(text)]
        if len(parts) > 1:
            if any(isinstance(part, Range) for part in parts):
                raise ConfigError(f"--set {key}: a range (LOW..HIGH) stands alone, without further values")
            if len({repr(part) for part in parts}) < len(parts):
                raise ConfigError(f"--set {key}: a value is given twice")
            space[key] = parts
        elif isinstance(parts[0], Range):
            space[key] = parts[0]
        else:
            fixed[key] = parts[0]
    return fixed, space


def split(text: str) -> list[str]:
    """Cut at the commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _value(key: str, text: str) -> Any:
    if (found := RANGE.fullmatch(text)) and all(map(_is_number, found.groups())):
        low, high = map(float, found.groups())
        if not low < high:
            raise ConfigError(f"--set {key}: {text} is no range: the first number must be the smaller")
        return Range(low, high, all(part.strip().lstrip("-").isdigit() for part in found.groups()))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: {text!r} is not a YAML value") from None
    return float(value) if isinstance(value, str) and _is_number(value) else value  # YAML reads 1e-4 as a text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination, the last key varying first. Raises `ConfigError` for a range."""
    ranges = [key for key, values in space.items() if isinstance(values, Range)]
    if ranges:
        raise ConfigError(f"{ranges[0]} is a range, which a grid cannot have: list its values, or use --search random")
    return [dict(zip(space, values)) for values in itertools.product(*space.values())]


def sample(space: Space, trials: int, seed: int) -> list[dict[str, Any]]:
    """`trials` random draws, no two the same; fewer where there are no more. The same for the same seed."""
    rng = random.Random(seed)
    if not any(isinstance(values, Range) for values in space.values()):
        every = grid(space)
        return rng.sample(every, min(trials, len(every)))
    found: dict[str, dict[str, Any]] = {}
    for _ in range(100 * trials):
        drawn = {k: v.draw(rng) if isinstance(v, Range) else rng.choice(v) for k, v in space.items()}
        found.setdefault(repr(drawn), drawn)
        if len(found) == trials:
            break
    return list(found.values())


def rungs(trials: int) -> list[float]:
    """Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): the shares of a run at which the worse half
    stops. Each rung doubles the one before, so that every rung costs about the same; one trial reaches the end."""
    count = max(0, math.ceil(math.log2(trials))) if trials > 1 else 0
    return [2.0 ** (i - count) for i in range(count)]


def better_half(scores: dict[str, float | None], of: int | None = None) -> list[str]:
    """The names that go on: the better half of `of` trials (all here, if absent), rounded up, by loss; None (diverged)
    and NaN never do."""
    sound = {name: loss for name, loss in scores.items() if loss is not None and math.isfinite(loss)}
    ranked = sorted(sound, key=lambda name: sound[name])
    return ranked[: max(1, math.ceil((of or len(scores)) / 2))]

"""What the engine counts: totals, a rate over the last seconds, and histograms as Prometheus wants them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from time import monotonic
from typing import Any

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
WINDOW = 10.0


class Histogram:
    """Counts of values in seconds by upper bound."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(SECONDS) + 1), 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(SECONDS, value)] += 1
        self.sum += value

    def as_dict(self) -> dict[str, Any]:
        """Cumulative counts, the last of them for +Inf."""
        cumulative, total = [], 0
        for count in self.counts:
            total += count
            cumulative.append(total)
        return {"buckets": list(SECONDS), "counts": cumulative, "sum": self.sum, "count": total}


class Metrics:
    """Written by the engine's thread alone; read by anyone."""

    def __init__(self) -> None:
        self.started = monotonic()
        self.tokens = self.prompt = self.cached = 0
        self.finished: Counter[str] = Counter()
        self.first, self.interval, self.request = Histogram(), Histogram(), Histogram()
        self._recent: deque[tuple[float, int]] = deque()
        self._ends: deque[float] = deque(maxlen=64)

    def generated(self, count: int) -> None:
        """Count tokens of one step."""
        now = monotonic()
        self.tokens += count
        self._recent.append((now, count))
        while self._recent[0][0] < now - WINDOW:
            self._recent.popleft()

    def ended(self, reason: str, seconds: float) -> None:
        """Count a finished request."""
        self.finished[reason] += 1
        self.request.add(seconds)
        self._ends.append(monotonic())

    def rate(self) -> float:
        """Tokens per second over the last ten seconds, or since the start."""
        now = monotonic()
        recent = sum(count for at, count in list(self._recent) if at >= now - WINDOW)
        return recent / max(min(WINDOW, now - self.started), 1e-3)

    def seconds_for(self, requests: int) -> float:
        """About how long `requests` take to finish, from the last ones; between 1 and 60."""
        ends = list(self._ends)
        each = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 1.0
        return min(60.0, max(1.0, requests * each))

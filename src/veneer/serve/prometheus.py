"""Prometheus' view: the engine's own numbers read at each scrape, and HTTP requests by route and status."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GAUGES = {
    "running": "Requests that have a slot",
    "waiting": "Requests in the queue",
    "slots": "Requests that can run at once",
    "tokens_per_second": "Generated tokens per second, over the last ten seconds",
    "uptime_seconds": "Seconds since the engine started",
}
COUNTERS = {
    "tokens_generated": "Tokens generated",
    "prompt_tokens": "Tokens of accepted prompts",
    "cached_tokens": "Tokens of prompts taken from the prefix cache",
}
HISTOGRAMS = {
    "time_to_first_token": "Seconds from a request to its first token",
    "token_interval": "Seconds between two tokens of an answer",
    "request": "Seconds from a request to the end of its answer",
}


class _Engine:
    """Turns `Engine.stats()` into metrics, each time it is asked."""

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self.stats = stats

    def describe(self) -> list[Metric]:
        return []  # registering asks for nothing: the engine may not be started yet

    def collect(self) -> Iterator[Metric]:
        found = self.stats()
        for key, text in GAUGES.items():
            yield GaugeMetricFamily(f"veneer_{key}", text, value=found[key])
        for key, text in COUNTERS.items():
            yield CounterMetricFamily(f"veneer_{key}", text, value=found[key])
        finished = CounterMetricFamily("veneer_requests", "Finished requests", labels=["finish_reason"])
        for reason, count in found["requests"].items():
            finished.add_metric([str(reason)], count)
        adapters = GaugeMetricFamily("veneer_adapters", "Loaded adapters by the memory they lie in", labels=["tier"])
        for tier, count in found["adapters"].items():
            adapters.add_metric([tier], count)
        yield from (finished, adapters)
        for key, text in HISTOGRAMS.items():
            yield _histogram(f"veneer_{key}_seconds", text, found["histograms"][key])


def _histogram(name: str, text: str, found: dict[str, Any]) -> HistogramMetricFamily:
    bounds = [*map(str, found["buckets"]), "+Inf"]
    return HistogramMetricFamily(name, text, buckets=list(zip(bounds, found["counts"])), sum_value=found["sum"])


class Metrics:
    """One application's metrics; they are not the process's, so that two applications do not collide."""

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(stats))
        self.http = Counter(
            "veneer_http_requests", "HTTP requests", ["method", "route", "status"], registry=self.registry
        )

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware that counts answers. A path that no route has is counted as "other": a label for each would grow
    without end."""

    def __init__(self, app: Any, *, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        route = scope["path"] if scope["path"] in self.routes else "other"
        method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
        started = False

        async def counted(message: dict[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.metrics.http.labels(method, route, str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:  # a fault: what stands before this answers it, with 500
            if not started:
                self.metrics.http.labels(method, route, "500").inc()
            raise

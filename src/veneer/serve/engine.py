"""The engine: one thread owns the model and runs all requests together; everyone else talks to it through queues."""

from __future__ import annotations

from typing import Any

from veneer.serve.registry import Registry
from veneer.serve.request import Piece, Request, Sampling, Ticket

__all__ = ["Engine", "Piece", "Request", "Sampling", "Ticket"]


class Engine:
    """Continuous batching over a slotted KV cache; see `submit`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        registry: Registry,
        *,
        slots: int = 16,
        context: int = 2048,
        queue: int = 64,
    ) -> None: ...

    def start(self) -> None:
        """Start the thread that owns the model."""
        raise NotImplementedError

    def submit(self, request: Request) -> Ticket:
        """Accept a request. Raises `Overloaded`, `UnknownAdapter`, `PromptTooLong`, `ServeError` (not running)."""
        raise NotImplementedError

    def shutdown(self, drain_seconds: float = 30.0) -> None:
        """Take no more requests, finish those accepted for up to `drain_seconds`, cancel the rest, stop the thread."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """Numbers for a status page and for Prometheus.

        running, waiting, slots, tokens_generated, prompt_tokens, cached_tokens, requests (by finish reason),
        tokens_per_second (of the last ten seconds), adapters {device, host, disk}, uptime_seconds, and histograms
        {"time_to_first_token" | "token_interval" | "request": {"buckets": [upper bounds], "counts": [cumulative counts,
        +Inf last], "sum", "count"}} in seconds.
        """
        raise NotImplementedError

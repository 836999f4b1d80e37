"""What the engine and the registry raise for a request that cannot be served; each a `VeneerError` of one line."""

from __future__ import annotations

from veneer.errors import VeneerError


class ServeError(VeneerError, RuntimeError):
    """The engine cannot do this now (not started, shutting down), or the model cannot be served."""


class Overloaded(ServeError):
    """The queue is full. `retry_after` is a guess, in seconds, at when there will be room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full: try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class UnknownAdapter(VeneerError, ValueError):
    """A request names an adapter that is not loaded."""


class PromptTooLong(VeneerError, ValueError):
    """A prompt with its answer does not fit the context; or a request is empty or out of range."""


class AdapterRefused(VeneerError, ValueError):
    """An adapter may not be loaded: outside the allowed folders, too large, or of a kind that rows cannot share."""


class AdapterExists(VeneerError, ValueError):
    """An adapter of that name is loaded already, and `replace` was not asked for."""

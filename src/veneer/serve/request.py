"""What is asked of the engine, and what comes back: plain data, and a ticket to read an answer from."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Protocol


class Grammar(Protocol):
    """Restricts one answer's tokens, for example to a JSON schema; made anew for each request."""

    def allowed(self) -> Any:
        """What may come next: a bool tensor (vocabulary,) on the CPU, or token ids; None for everything."""

    def accept(self, token: int) -> None:
        """A token was chosen."""


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen. Temperature 0 is greedy; top_k 0 is off; without a seed one is drawn.

    `stop` strings end the answer and are not part of it. `logprobs` is the number of alternatives to report beside
    each chosen token (0: the chosen alone), of the distribution before temperature and cuts.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Request:
    """A prompt's token ids and the adapters that answer it: (name, weight) pairs, none for the base alone.

    `continues`: the answer's text goes on from the prompt's, with the space that its first token may begin with.
    """

    prompt: list[int]
    sampling: Sampling
    adapters: tuple[tuple[str, float], ...] = ()
    continues: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its log-probability, and the most likely tokens with theirs, most likely first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, of them taken from the prefix cache, and of the answer so far."""

    prompt: int
    cached: int
    completion: int


@dataclass
class Piece:
    """A part of an answer. `text` may lag behind `tokens`: half characters and possible stop strings are held back.

    `finish_reason` is None but in the last piece: "stop", "length", "cancelled" or "error" (then `error` says why).
    """

    text: str
    tokens: list[int]
    usage: Usage
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass
class Ticket:
    """An accepted request: iterate its pieces, with `for` in a thread or `async for` in an event loop; one reader."""

    request: Request
    id: int = 0
    _pieces: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    _cancelled: Event = field(default_factory=Event)
    _wake: Callable[[], None] | None = None
    _finished: bool = False

    def __iter__(self) -> Iterator[Piece]:
        while not self._finished:
            piece = self._pieces.get()
            self._finished = piece.finish_reason is not None
            yield piece

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the reader's loop is closed: nobody waits any more
                pass

        self._wake = wake
        while not self._finished:
            try:
                piece = self._pieces.get_nowait()
            except queue.Empty:
                await arrived.wait()
                arrived.clear()
                continue
            self._finished = piece.finish_reason is not None
            yield piece

    def cancel(self) -> None:
        """Stop the answer; its slot is free after the step that runs now. The last piece says "cancelled"."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def put(self, piece: Piece) -> None:
        """The engine's side: hand a piece to the reader."""
        self._pieces.put(piece)
        if self._wake is not None:
            self._wake()

"""From the engine's pieces to the OpenAI API's answers: gathered into one body, or chunk by chunk."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse

from veneer.serve.asked import Asked
from veneer.serve.problems import ApiError
from veneer.serve.request import Piece, Ticket, TokenLogprob
from veneer.serve.schema import PromptDetails, Usage

DONE = "data: [DONE]\n\n"


@dataclass
class Gathered:
    """One choice, whole."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class Running:
    """The tickets of one HTTP request: all of them submitted, or none.

    Raises what `submit` raises; the choices that had been accepted are cancelled then.
    """

    def __init__(self, submit: Callable[[Any], Ticket], asked: Asked) -> None:
        self.asked, self.tickets, self.last, self.left = asked, [], {}, False
        try:
            for request in asked.requests:
                self.tickets.append(submit(request))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give the slots back; does nothing to answers that are finished."""
        for ticket in self.tickets:
            ticket.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, piece) of all choices as they come. However the iteration ends, every ticket ends with it."""
        arrived: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

        async def read(index: int, ticket: Ticket) -> None:
            async for piece in ticket:
                arrived.put_nowait((index, piece))

        readers = [asyncio.create_task(read(index, ticket)) for index, ticket in enumerate(self.tickets)]
        try:
            left = len(readers)
            while left:
                index, piece = await arrived.get()
                self.last[index] = piece
                left -= piece.finish_reason is not None
                if piece.finish_reason == "error":
                    raise ApiError(500, f"{piece.error}", "server_error")
                if piece.finish_reason == "cancelled" and self.left:
                    raise ApiError(499, "the client has gone")  # which nobody reads, but the metrics count
                if piece.finish_reason == "cancelled":
                    raise ApiError(503, "the answer was cancelled: the server is shutting down", "server_error")
                yield index, piece
        finally:
            self.cancel()
            for reader in readers:
                reader.cancel()

    async def gather(self, http: HttpRequest) -> list[Gathered]:
        """All choices, whole. If the client goes away its tickets are cancelled, and `ApiError` is raised."""
        watcher = asyncio.create_task(self._watch(http))
        found = [Gathered() for _ in self.tickets]
        try:
            async with aclosing(self.pieces()) as pieces:
                async for index, piece in pieces:
                    found[index].text += piece.text
                    found[index].logprobs += piece.logprobs or []
                    found[index].finish_reason = piece.finish_reason
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        return found

    async def _watch(self, http: HttpRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self.cancel()

    def usage(self) -> Usage:
        """Tokens of the request so far; each prompt counts once, whatever the number of its choices."""
        last = [self.last.get(index) for index in range(len(self.tickets))]
        prompt = sum(len(request.prompt) for request in self.asked.requests[:: self.asked.n])
        cached = sum(piece.usage.cached for piece in last[:: self.asked.n] if piece)
        completion = sum(piece.usage.completion for piece in last if piece)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
        )


def new_id(prefix: str) -> dict[str, Any]:
    """The fields that every answer and chunk of a request starts with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time())}


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def stream(
    running: Running, head: dict[str, Any], choice: Callable[[int, Piece], dict[str, Any]], first: list[dict[str, Any]]
) -> AsyncIterator[str]:
    """Server-sent events: `first` choices, then `choice(index, piece)` of each piece; usage if it was asked for.

    Once bytes have left, an error can only be an event of its own.
    """
    try:
        for opening in first:
            yield event(head | {"choices": [opening]})
        async with aclosing(running.pieces()) as pieces:
            async for index, piece in pieces:
                if piece.text or piece.finish_reason or piece.logprobs:
                    yield event(head | {"choices": [choice(index, piece)]})
        if running.asked.usage_chunk:
            yield event(head | {"choices": [], "usage": running.usage().model_dump()})
    except ApiError as error:
        yield event(error.body)
    yield DONE


class Events(StreamingResponse):
    """Server-sent events that no proxy holds back. However they end, and if they never begin, so do the answers."""

    def __init__(self, running: Running, chunks: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self.running = running

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.running.cancel()


class Logprobs:
    """Log-probabilities as the two endpoints write them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.known = self._decode(self.before)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _text(self, token: int) -> str:
        """As it reads within a text: SentencePiece's tokenizers drop the space that a first token begins with."""
        return self._decode([*self.before, token])[len(self.known) :]

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        # A token that holds part of a character decodes to U+FFFD: its bytes are not known from its text.
        return {"token": text, "logprob": _finite(logprob), "bytes": None if "�" in text else list(text.encode())}

    def chat(self, found: list[TokenLogprob]) -> dict[str, Any]:
        """`logprobs` of a chat's choice."""
        return {
            "content": [
                self._one(one.token, one.logprob) | {"top_logprobs": [self._one(*top) for top in one.top]}
                for one in found
            ]
        }

    def text(self, found: list[TokenLogprob], offset: int = 0) -> dict[str, Any]:
        """`logprobs` of a text completion's choice; `offset`: characters of the choice before these tokens."""
        tokens = [self._text(one.token) for one in found]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(one.logprob) for one in found],
            "top_logprobs": [{self._text(t): _finite(p) for t, p in one.top} for one in found],
            "text_offset": offsets,
        }


def _finite(logprob: float) -> float:
    """JSON has no -inf; OpenAI's servers write -9999 for it."""
    return max(float(logprob), -9999.0)

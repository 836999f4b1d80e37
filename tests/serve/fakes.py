"""An engine and a registry that hold the contract and answer at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from veneer.serve.errors import AdapterExists, AdapterRefused, Overloaded, PromptTooLong, UnknownAdapter
from veneer.serve.registry import AdapterInfo
from veneer.serve.request import Piece, Ticket, TokenLogprob, Usage


class FakeRegistry:
    def __init__(self, allowed, names=()):
        self.allowed, self.loaded = [Path(a) for a in allowed], {}
        for name in names:
            self.loaded[name] = self._info(name, Path("/adapters") / name, False)

    @staticmethod
    def _info(name, path, pinned):
        return AdapterInfo(name, path, "c0ffee", 8, 14, 1 << 20, pinned, "device")

    def load(self, name, path, *, pinned=False, replace=False):
        if not any(Path(path).resolve().is_relative_to(folder) for folder in self.allowed):
            raise AdapterRefused(f"{path} is in none of the folders that adapters may be loaded from")
        if name in self.loaded and not replace:
            raise AdapterExists(f"{name} is loaded")
        self.loaded[name] = self._info(name, Path(path), pinned)
        return self.loaded[name]

    def unload(self, name):
        if self.loaded.pop(name, None) is None:
            raise UnknownAdapter(f"{name} is not loaded")

    def names(self):
        return list(self.loaded)

    def info(self, name):
        return self.loaded[name]


class FakeEngine:
    """Answers with the words of "<adapters> heard <number> tokens: <seed>", one token at a time."""

    def __init__(self, registry, tokenizer, context=512, delay=0.0):
        self.registry, self.tokenizer, self.context, self.delay = registry, tokenizer, context, delay
        self.tickets, self.full, self.broken, self.words = [], False, False, 0
        self.finished, self.limit, self.fault = Counter(), 12, None

    def submit(self, request):
        if self.full:
            raise Overloaded(2.4)
        if len(request.prompt) + request.sampling.max_tokens > self.context:
            raise PromptTooLong(f"{len(request.prompt)} tokens and {request.sampling.max_tokens} new ones")
        for name, _ in request.adapters:
            if name not in self.registry.loaded:
                raise UnknownAdapter(f"{name} is not loaded")
        ticket = Ticket(replace(request), len(self.tickets))
        self.tickets.append(ticket)
        threading.Thread(target=self._answer, args=(ticket,), daemon=True).start()
        return ticket

    def text(self, request):
        who = "+".join(f"{name}*{weight:g}" for name, weight in request.adapters) or "base"
        return f"{who} heard {len(request.prompt)} tokens: {request.sampling.seed}" + " and more" * self.words

    def _answer(self, ticket):
        request = ticket.request
        tokens = self.tokenizer(self.text(request))["input_ids"]
        made, reason = 0, "stop"
        for token in tokens:
            if made == request.sampling.max_tokens:
                reason = "length"
                break
            if ticket.cancelled or self.broken:
                reason = "cancelled" if ticket.cancelled else "error"
                break
            made += 1
            wanted = request.sampling.logprobs
            found = (
                [TokenLogprob(token, -0.5, tuple((t, -0.5 - t) for t in range(wanted)))] if wanted is not None else None
            )
            ticket.put(Piece(self.tokenizer.decode([token]), [token], Usage(len(request.prompt), 1, made), found))
            time.sleep(self.delay)
        self.finished[reason] += 1
        error = "it broke" if reason == "error" else None
        ticket.put(Piece("", [], Usage(len(request.prompt), 1, made), None, reason, error))

    def start(self):
        pass

    def shutdown(self, drain_seconds=30.0):
        for ticket in self.tickets:
            ticket.cancel()

    def stats(self):
        histogram = {"buckets": [0.1, 1.0], "counts": [1, 2, 3], "sum": 2.5, "count": 3}
        return {
            "running": 1,
            "waiting": 0,
            "slots": 4,
            "tokens_generated": 17,
            "prompt_tokens": 23,
            "cached_tokens": 5,
            "requests": dict(self.finished),
            "tokens_per_second": 12.5,
            "adapters": {"device": len(self.registry.loaded), "host": 0, "disk": 0},
            "uptime_seconds": 3.0,
            "histograms": {"time_to_first_token": histogram, "token_interval": histogram, "request": histogram},
        }

"""The engine: one thread owns the model and runs all requests together; everyone else talks to it through queues."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from threading import Condition, Thread
from time import monotonic
from typing import Any

from torch import Tensor

from veneer.base.generate import end_tokens
from veneer.errors import ConfigError, VeneerError
from veneer.serve.errors import Overloaded, PromptTooLong, ServeError
from veneer.serve.metrics import Metrics
from veneer.serve.registry import Registry
from veneer.serve.request import Piece, Request, Sampling, Ticket
from veneer.serve.runner import Runner
from veneer.serve.sampling import generator
from veneer.serve.slots import Running, Slots, shares
from veneer.serve.step import Step, choose_tokens
from veneer.serve.text import StopFilter, TextStream
from veneer.serve.trusted import on, runner_for

__all__ = ["Engine", "Piece", "Request", "Sampling", "Ticket"]

MOST_ADAPTERS = 8
"""In one request."""
CHUNK = {"cpu": 64, "cuda": 1024}
"""Tokens of prompts in one pass while answers are being written; they wait for it."""
LEAST = {"cpu": 16, "cuda": 256}
"""Tokens of a prompt in one pass, unless it ends: fewer prompts at a time are ready sooner than all of them together."""
PATIENCE = 1.0
"""Seconds for which later requests may overtake one whose adapters find no place on the device."""

NOT_FINITE = "the model gave no finite numbers: an adapter is damaged, or too strong for the model's dtype"


class Engine:
    """Continuous batching over a slotted KV cache.

    `slots` requests run at once, each with room for `context` tokens; `queue` more wait for a slot. A row without an
    adapter computes what the base computes; rows never see each other.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        registry: Registry,
        *,
        slots: int = 16,
        context: int = 2048,
        queue: int = 64,
    ) -> None:
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or context
        self.tokenizer, self.registry = tokenizer, registry
        self.context, self.limit = min(context, room), slots + queue
        self.ends = frozenset(end_tokens(model, tokenizer))
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        with on(registry.device):
            self.runner = self._runner(registry)(model, registry, slots, self.context)
        self.slots, self.metrics = Slots(slots), Metrics()
        self.chunk, self.least = (sizes.get(registry.device.type, 256) for sizes in (CHUNK, LEAST))
        self._waiting: list[Running] = []
        self._filling: list[Running] = []
        self._writing: list[Running] = []
        self._arrived = Condition()
        self._new: list[Running] = []
        self._in_flight = 0
        self._ids = itertools.count(1)
        self._stop_at: float | None = None
        self.fault: str | None = None
        """Why the thread ended, if it was not asked to."""
        self._step: Step | None = None
        """A step that is begun and not settled."""
        self._thread: Thread | None = None

    # For everyone

    def start(self) -> None:
        """Start the thread that owns the model."""
        if self._thread is not None:
            raise ServeError("the engine was started already")
        self._thread = Thread(target=self._work, name="veneer-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Ticket:
        """Accept a request. Raises `Overloaded`, `UnknownAdapter`, `PromptTooLong`, `ServeError` (not running),
        `ConfigError` (a stack that is too large, or a weight that is no number)."""
        self._check(request)
        with self._arrived:
            if self._thread is None or self._stop_at is not None:
                ended = "shutting down" if self.fault is None else f"no more: it failed ({self.fault})"
                raise ServeError("start the engine" if self._stop_at is None else f"the engine is {ended}")
            if self._in_flight >= self.limit:
                raise Overloaded(self.metrics.seconds_for(self._in_flight - len(self.slots.slots)))
            contents = self.registry.acquire([name for name, _ in request.adapters])
            ticket = Ticket(request, next(self._ids))
            self._new.append(self._running(ticket, contents))
            self._in_flight += 1
            self._arrived.notify()
        return ticket

    def drain(self, seconds: float) -> None:
        """Take no more requests, finish those accepted for up to `seconds` and cancel the rest; does not wait for it."""
        with self._arrived:
            self._stop_at = monotonic() + seconds
            self._arrived.notify()

    def shutdown(self, drain_seconds: float = 30.0) -> None:
        """As `drain`, and wait for it; then stop the thread and give the model back as it was."""
        self.drain(drain_seconds)
        if self._thread is not None:
            self._thread.join()
        self.runner.close()
        self.registry.close()

    def stats(self) -> dict[str, Any]:
        """Numbers for a status page and for Prometheus.

        running, waiting, slots, tokens_generated, prompt_tokens, cached_tokens, requests (by finish reason),
        tokens_per_second (of the last ten seconds), adapters {device, host, disk}, uptime_seconds, and histograms
        {"time_to_first_token" | "token_interval" | "request": {"buckets": [upper bounds], "counts": [cumulative counts,
        +Inf last], "sum", "count"}} in seconds.
        """
        m = self.metrics
        running = len(self.slots.slots) - self.slots.free
        histograms = {"time_to_first_token": m.first, "token_interval": m.interval, "request": m.request}
        return {
            "running": running,
            "waiting": max(0, self._in_flight - running),
            "slots": len(self.slots.slots),
            "tokens_generated": m.tokens,
            "prompt_tokens": m.prompt,
            "cached_tokens": m.cached,
            "requests": dict(m.finished),
            "tokens_per_second": m.rate(),
            "adapters": self.registry.tiers(),
            "uptime_seconds": monotonic() - m.started,
            "histograms": {name: histogram.as_dict() for name, histogram in histograms.items()},
        }

    def _check(self, request: Request) -> None:
        s, prompt = request.sampling, request.prompt
        if not prompt:
            raise PromptTooLong("the prompt is empty")
        if s.max_tokens < 1:
            raise PromptTooLong("max_tokens is below 1")
        if len(prompt) + s.max_tokens > self.context:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens; with {s.max_tokens} new ones it exceeds the context of "
                f"{self.context}: shorten it or lower max_tokens"
            )
        if not all(0 <= token < self.vocabulary for token in prompt):
            raise PromptTooLong(f"the prompt holds token ids outside the vocabulary of {self.vocabulary}")
        if len(request.adapters) > MOST_ADAPTERS:
            raise ConfigError(f"a request stacks at most {MOST_ADAPTERS} adapters")
        if len({name for name, _ in request.adapters}) > self.runner.pool.size:
            raise ConfigError(f"{self.runner.pool.size} adapters fit on the device, and the request stacks more")
        if not all(math.isfinite(weight) for _, weight in request.adapters):
            raise ConfigError("an adapter's weight is not a finite number")

    def _running(self, ticket: Ticket, contents: list) -> Running:
        request = ticket.request
        key = tuple((c.hash, float(weight)) for c, (_, weight) in zip(contents, request.adapters))
        seed = request.sampling.seed
        return Running(
            ticket,
            contents,
            key,
            TextStream(self.tokenizer, request.prompt if request.continues else ()),
            StopFilter(tuple(request.sampling.stop)),
            generator(seed),
            monotonic(),
            list(request.prompt),
        )

    @staticmethod
    def _runner(registry: Registry) -> type[Runner]:
        return runner_for(registry)

    # The thread that owns the model

    def _work(self) -> None:
        try:
            with on(self.registry.device):
                self.runner.prepare()
                self._serve()
        except Exception as error:  # a fault of the engine itself: nobody may wait for an answer for ever
            with self._arrived:
                self._stop_at, self.fault = monotonic(), f"{error}"[:500]
                left = self._all() + self._new
            for running in left:
                running.tell("", "error", f"the engine failed: {self.fault}")
            raise

    def _serve(self) -> None:
        while self._collect():
            self._drop_cancelled()
            self.runner.pool.drop_dead()
            self._admit()
            worked = self._fill()
            worked |= self._write()
            if not worked and self._waiting:  # for an adapter that is being read
                with self._arrived:
                    self._arrived.wait(0.002)

    def _collect(self) -> bool:
        """Take new requests; with nothing to do, wait for one. False when it is time to stop."""
        with self._arrived:
            while not (self._new or self._waiting or self._filling or self._writing or self._step):
                if self._stop_at is not None:
                    return False
                self._arrived.wait(0.25)
                self.runner.pool.drop_dead()
            self._waiting += self._new
            self._new = []
        if self._stop_at is not None and monotonic() > self._stop_at:
            for running in self._all():
                running.ticket.cancel()
        return True

    def _all(self) -> list[Running]:
        return [*self._waiting, *self._filling, *self._writing]

    def _drop_cancelled(self) -> None:
        for running in self._all():
            if running.ticket.cancelled:
                self._finish(running, "", "cancelled")

    def _admit(self) -> None:
        """Give free slots to requests whose adapters are at hand, in the order they came.

        One that has found no place for its adapters for long stops those behind it, or the places would never be left.
        """
        for running in list(self._waiting):
            if not self.slots.free:
                return
            if failure := next((f for c in running.contents if (f := self.registry.failure(c))), None):
                self._finish(running, "", "error", failure)
            elif all([self.registry.ready(c) for c in running.contents]):
                with self._blaming([running]):
                    self._place(running)
                if running.crowded_out is not None and monotonic() - running.crowded_out > PATIENCE:
                    return

    def _place(self, running: Running) -> None:
        slot, donor, length = self.slots.choose(running)
        for content in running.contents:
            place = self.runner.pool.acquire(content, slot)
            if place is None:  # all in use: another round
                self._release_places(running)
                running.crowded_out = running.crowded_out or monotonic()
                return
            running.places.append(place)
        if length and donor != slot:
            self.runner.cache.copy(donor, slot, length)
        self.slots.take(running, slot, length)
        running.crowded_out = None
        self.metrics.prompt += running.prompt
        self.metrics.cached += running.cached
        self._waiting.remove(running)
        self._filling.append(running)

    def _release_places(self, running: Running) -> None:
        for place in running.places:
            self.runner.pool.release(place)
        running.places.clear()

    def _fill(self) -> bool:
        """Run a chunk of the prompts at work, a share of each (`slots.shares`); those that end get their first token."""
        if not self._filling:
            return False
        budget = self.chunk if self._writing else min(4 * self.chunk, self.runner.most)
        counts = shares([running.prompt - running.filled for running in self._filling], budget, self.least)
        chosen = [one for one in zip(self._filling, counts) if one[1]]
        chosen.sort(key=lambda one: one[0].uses)
        pieces = [(r.slot, r.filled, r.tokens[r.filled : r.filled + count], r.uses) for r, count in chosen]
        ended = [r.filled + count == r.prompt for r, count in chosen]
        with self._blaming([r for r, _ in chosen]):
            logits = self.runner.prompts(pieces, ended)
            for running, count in chosen:
                running.filled += count
            done = [r for (r, _), end in zip(chosen, ended) if end]
            for running in done:
                self._filling.remove(running)
                self._writing.append(running)
            if done:
                self._settle(choose_tokens(done, logits))
        return True

    def _write(self) -> bool:
        """One more token for every answer at work.

        On a GPU the next step is begun before the last one's tokens are read, while the rows stay the same.
        """
        before, self._step = self._step, None
        rows = sorted(self._writing, key=lambda r: r.slot)
        if before is not None and self._steady(before.rows, rows):
            with self._blaming(rows):
                self._step = self._begin(rows, before.chosen)
            self._settle(before)
            return True
        if before is not None:
            self._settle(before)
            rows = sorted(self._writing, key=lambda r: r.slot)
        if rows:
            with self._blaming(rows):
                step = self._begin(rows, None)
                if self.runner.lookahead:
                    self._step = step
                else:
                    self._settle(step)
        return bool(rows) or before is not None

    def _steady(self, before: list[Running], rows: list[Running]) -> bool:
        """Whether the rows of the step before go on for sure, or nearly: an end token may waste one step of a row."""
        rules = [r.ticket.request.sampling for r in rows]
        return before == rows and all(
            s.grammar is None and s.logprobs is None and r.answered + 1 < s.max_tokens for r, s in zip(rows, rules)
        )

    def _begin(self, rows: list[Running], ahead: Tensor | None) -> Step:
        logits = self.runner.tokens([(r.slot, r.filled, r.tokens[-1], r.uses) for r in rows], ahead)
        for running in rows:
            running.filled += 1
        return choose_tokens(rows, logits)

    def _settle(self, step: Step) -> None:
        """Hand on the tokens of a step, but those of requests that ended meanwhile."""
        with self._blaming(step.rows):
            if step.event is not None:
                step.event.synchronize()
            rows = [
                (r, token, note) for r, token, note in zip(step.rows, step.host.tolist(), step.notes) if r.slot >= 0
            ]
            self.metrics.generated(len(rows))
            for running, token, note in rows:
                with self._blaming([running]):
                    if token < 0 or running in step.failed:
                        self._finish(running, "", "error", step.failed.get(running, NOT_FINITE))
                    elif running in step.blocked:
                        self._finish(running, running.stop.add(running.text.rest()) + running.stop.rest(), "stop")
                    else:
                        self._take(running, token, note)

    def _take(self, running: Running, token: int, note: Any) -> None:
        """Add a chosen token to an answer, tell the reader, and end the answer where it ends."""
        sampling, now = running.ticket.request.sampling, monotonic()
        if running.last_token_at is None:
            self.metrics.first.add(now - running.arrived)
        else:
            self.metrics.interval.add(now - running.last_token_at)
        running.last_token_at = now
        if token in self.ends and not sampling.ignore_eos:
            running.extra = 1
            self._finish(running, running.stop.add(running.text.rest()) + running.stop.rest(), "stop")
            return
        running.tokens.append(token)
        running.pending.append(token)
        if note is not None:
            running.logprobs.append(note)
        if sampling.grammar is not None:
            sampling.grammar.accept(token)
        text = running.stop.add(running.text.add(token))
        if running.stop.hit:
            self._finish(running, text, "stop")
        elif running.answered >= sampling.max_tokens:
            text += running.stop.add(running.text.rest()) + running.stop.rest()
            self._finish(running, text, "stop" if running.stop.hit else "length")
        else:
            running.tell(text)

    def _finish(self, running: Running, text: str, reason: str, error: str | None = None) -> None:
        """End a request and give back all that it holds; then tell its reader."""
        if running.slot >= 0 and reason not in ("stop", "length"):  # whose last token saw all before it, and was finite
            whole = self.runner.cache.clean(running.slot, self.context if reason == "error" else running.filled)
            running.filled = running.filled if whole and reason != "error" else 0  # what may not be trusted is not kept
        for group in (self._waiting, self._filling, self._writing):
            if running in group:
                group.remove(running)
        self._release_places(running)
        if running.slot >= 0:
            self.slots.give_back(running)
        self.registry.release(running.contents)
        with self._arrived:
            self._in_flight -= 1
        self.metrics.ended(reason, monotonic() - running.arrived)
        running.tell(text, reason, error)

    def _blaming(self, rows: Sequence[Running]) -> _Blaming:
        return _Blaming(self, list(rows))


class _Blaming:
    """What goes wrong in a pass ends the requests of that pass with an error, and the engine goes on."""

    def __init__(self, engine: Engine, rows: list[Running]) -> None:
        self.engine, self.rows = engine, rows

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        known = isinstance(error, VeneerError)
        for running in self.rows:
            if running.contents is not None and running in self.engine._all():
                self.engine._finish(running, "", "error", text if known else f"the model failed: {text}")
        return True

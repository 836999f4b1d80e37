"""Slots of the cache: who has them, and what finished requests left there for others to begin with."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from veneer.serve.content import Content
from veneer.serve.request import Piece, Ticket, TokenLogprob, Usage
from veneer.serve.text import StopFilter, TextStream

SHORTEST_PREFIX = 4
"""Tokens below which a copied prefix is not worth the bookkeeping."""


@dataclass(eq=False)
class Running:
    """A request at work: `tokens` are the prompt's and the answer's, of which the first `filled` are in its slot."""

    ticket: Ticket
    contents: list[Content]
    key: Hashable
    text: TextStream
    stop: StopFilter
    draw: random.Random
    arrived: float
    tokens: list[int] = field(default_factory=list)
    filled: int = 0
    cached: int = 0
    slot: int = -1
    places: list[int] = field(default_factory=list)
    last_token_at: float | None = None
    crowded_out: float | None = None
    """Since when it could have a slot, and finds no place on the device for its adapters."""
    pending: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    extra: int = 0
    """1 once an end token was chosen, which is counted and not shown."""

    @property
    def prompt(self) -> int:
        """Length of the prompt."""
        return len(self.ticket.request.prompt)

    @property
    def answered(self) -> int:
        """Tokens chosen so far."""
        return len(self.tokens) - self.prompt + self.extra

    @property
    def uses(self) -> tuple[tuple[int, float], ...]:
        """(place, weight) of its adapters."""
        return tuple(zip(self.places, (weight for _, weight in self.ticket.request.adapters)))

    def tell(self, text: str, finish: str | None = None, error: str | None = None) -> None:
        """Hand the reader what is new; nothing, if that is no text, no log-probability and no end."""
        if not (text or self.logprobs or finish):
            return
        wanted = self.ticket.request.sampling.logprobs is not None
        usage = Usage(self.prompt, self.cached, self.answered)
        piece = Piece(text, self.pending, usage, self.logprobs if wanted else None, finish, error)
        self.pending, self.logprobs = [], []
        self.ticket.put(piece)


@dataclass
class Slot:
    """`tokens` whose keys and values lie here after the owner has gone, computed under the adapters `key`."""

    owner: Running | None = None
    key: Hashable = None
    tokens: list[int] = field(default_factory=list)
    used: float = 0.0

    @property
    def known(self) -> list[int]:
        """The tokens that lie here now."""
        return self.tokens if self.owner is None else self.owner.tokens[: self.owner.filled]


class Slots:
    """All slots. A prefix is taken over only from a slot of the same adapters, by content and weight."""

    def __init__(self, count: int) -> None:
        self.slots = [Slot() for _ in range(count)]

    @property
    def free(self) -> int:
        """How many have no owner."""
        return sum(slot.owner is None for slot in self.slots)

    def choose(self, running: Running) -> tuple[int, int, int]:
        """Where a request would go: (its slot, the slot whose start it takes over, tokens of that start)."""
        idle = [n for n, slot in enumerate(self.slots) if slot.owner is None]
        donor, length = self._longest(running)
        if length < SHORTEST_PREFIX:
            donor, length = -1, 0
        whole = donor in idle and 2 * length >= len(self.slots[donor].tokens)
        others = [n for n in idle if n != donor]
        target = donor if whole or not others else min(others, key=lambda n: (self.slots[n].used, n))
        return target, donor, length

    def take(self, running: Running, target: int, length: int) -> None:
        """Make a request the owner of a slot that holds its first `length` tokens, or will."""
        slot = self.slots[target]
        slot.owner, slot.key, slot.tokens = running, running.key, []
        running.slot, running.filled, running.cached = target, length, length

    def give_back(self, running: Running) -> None:
        """A request is done; what its slot holds stays for others."""
        slot = self.slots[running.slot]
        slot.owner, slot.tokens, slot.used = None, running.tokens[: running.filled], monotonic()
        running.slot = -1

    def forget(self) -> None:
        """Empty the prefix cache."""
        for slot in self.slots:
            if slot.owner is None:
                slot.key, slot.tokens = None, []

    def _longest(self, running: Running) -> tuple[int, int]:
        """The slot with the longest common start, and its length; one token is left, whose logits are wanted."""
        best, most = -1, 0
        for n, slot in enumerate(self.slots):
            if slot.key == running.key:
                length = min(common_start(slot.known, running.tokens), len(running.tokens) - 1)
                if length > most:
                    best, most = n, length
        return best, most


def shares(rests: Sequence[int], budget: int, least: int) -> list[int]:
    """How many of the `rests` of prompts (in the order they came) a pass takes, `budget` tokens in all.

    A fair part each, but no less than `least`, so that the last ones may have to wait; what is over goes to the first.
    """
    part, found = max(least, budget // len(rests)), []
    for rest in rests:
        found.append(min(rest, part, budget))
        budget -= found[-1]
    for n, rest in enumerate(rests):
        more = min(rest - found[n], budget)
        found[n] += more
        budget -= more
    return found


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix, by halving: comparing lists is quick, walking them is not."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

"""The device tier: stacked factors of the adapters in use, at addresses that stay while the pool does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

import torch
from torch import Tensor

from veneer.serve.content import Content
from veneer.serve.registry import Registry


@dataclass(frozen=True)
class Group:
    """Linears that read one input, such as q, k and v: their shrinks are one product. `targets` in the order called."""

    targets: tuple[str, ...]
    d_in: int
    d_outs: tuple[int, ...]


@dataclass
class Stack:
    """A group's factors at P places: A (P, d_in, n·R) for its n targets side by side, B[i] (P, R, d_out_i)."""

    A: Tensor
    B: list[Tensor]


@dataclass
class Place:
    """One place of the pool: what lies there, how many running requests use it, and when it last was used."""

    content: Content | None = None
    users: int = 0
    used: float = 0.0


@dataclass
class Pool:
    """`places` adapters of rank up to `rank` on the targets in `stacks`; grows when one needs more.

    Every factor is filled up with zeros to the pool's rank, and targets that an adapter lacks hold zeros.
    """

    registry: Registry
    groups: Sequence[Group]
    size: int
    device: torch.device
    dtype: torch.dtype
    power_ranks: bool = False
    rank: int = 0
    targets: frozenset[str] = frozenset()
    stacks: dict[Group, Stack] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    version: int = 0
    """Counts growths: addresses change with it."""

    def __post_init__(self) -> None:
        self.places = [Place() for _ in range(self.size)]

    def acquire(self, content: Content, prefer: int = 0) -> int | None:
        """A place that holds a content, for one more running request; None while it has to wait for one."""
        place = next((n for n, p in enumerate(self.places) if p.content is content), None)
        if place is None:
            place = None if content.host is None else self._free(prefer)
            if place is None:
                return None
            self._put(place, content)
        self.places[place].users += 1
        self.places[place].used = monotonic()
        return place

    def release(self, place: int) -> None:
        """A running request is done with a place; what lies there stays until it is needed for another."""
        self.places[place].users -= 1
        self.places[place].used = monotonic()

    def drop_dead(self) -> None:
        """Free the places of contents that were unloaded or replaced; with the last of them, all memory."""
        dead = self.registry.dead()
        for content in dead:
            self._clear(next(n for n, p in enumerate(self.places) if p.content is content))
        if dead and self.stacks and not any(p.content for p in self.places):
            self.stacks, self.rank, self.targets = {}, 0, frozenset()  # nothing is served from it: give it all back
            self.version += 1

    def _free(self, prefer: int) -> int | None:
        """The preferred place if it is empty, another empty one, or that of the content unused for longest."""
        order = sorted(range(self.size), key=lambda n: (n != prefer, n))
        empty = next((n for n in order if self.places[n].content is None), None)
        if empty is not None:
            return empty
        idle = [n for n in order if not self.places[n].users]
        if not idle:
            return None
        if prefer == idle[0] and not self.power_ranks and not self.places[prefer].content.pinned:
            return prefer  # rows in the order of places need no sorting, which is worth more than recency here
        return min(idle, key=lambda n: (self.places[n].content.pinned, self.places[n].used))

    def _clear(self, place: int) -> None:
        content, self.places[place].content = self.places[place].content, None
        self.registry.left_device(content)

    def _put(self, place: int, content: Content) -> None:
        if self.places[place].content is not None:
            self._clear(place)
        if content.rank > self.rank or not content.shapes.keys() <= self.targets:
            self.grow(*self.registry.extent(content))
        self._write(place, content)
        self.places[place].content, content.on_device = content, True

    def _write(self, place: int, content: Content) -> None:
        factors = content.factors(content.host.to(self.device, non_blocking=True))
        for group, stack in self.stacks.items():
            for part, target in enumerate(group.targets):
                columns = slice(part * self.rank, (part + 1) * self.rank)
                self._fill(stack.A[place, :, columns], stack.B[part][place], factors.get(target))

    def _fill(self, wide_A: Tensor, wide_B: Tensor, factors: tuple[Tensor, Tensor] | None) -> None:
        """Write Aᵀ (d_in, r) and Bᵀ (r, d_out) into (d_in, R) and (R, d_out)."""
        rank = 0 if factors is None else factors[0].shape[1]
        if rank < self.rank:
            wide_A[:, rank:].zero_()
            wide_B[rank:].zero_()
        if factors is not None:
            wide_A[:, :rank].copy_(factors[0])
            wide_B[:rank].copy_(factors[1])

    def grow(self, rank: int, targets: Iterable[str]) -> None:
        """Make the stacks anew for a larger rank or more targets, with what they hold."""
        power, multiple = max(16, 1 << (rank - 1).bit_length()), -(-rank // 4) * 4
        rank, targets = max(self.rank, power if self.power_ranks else multiple), self.targets | set(targets)
        options, stacks = {"dtype": self.dtype, "device": self.device}, {}
        for group in self.groups:
            if targets.isdisjoint(group.targets):
                continue
            wide = torch.zeros(self.size, group.d_in, len(group.targets) * rank, **options)
            stacks[group] = Stack(wide, [torch.zeros(self.size, rank, o, **options) for o in group.d_outs])
            if group in self.stacks:
                self._carry(stacks[group], self.stacks[group], rank)
        self.stacks, self.rank, self.targets = stacks, rank, targets
        self.version += 1

    def _carry(self, new: Stack, old: Stack, rank: int) -> None:
        for part, (wide, narrow) in enumerate(zip(new.B, old.B)):
            wide[:, : self.rank].copy_(narrow)
            own = old.A[:, :, part * self.rank : (part + 1) * self.rank]
            new.A[:, :, part * rank : part * rank + self.rank].copy_(own)


def groups_of(calls: Sequence[tuple[str, int]], targets: Mapping[str, tuple[int, int]]) -> list[Group]:
    """Groups from the order in which linears were called and which input each read: (target, id of the input)."""
    runs: list[list[str]] = []
    last = None
    for target, source in calls:
        if source == last:
            runs[-1].append(target)
        else:
            runs.append([target])
        last = source
    return [Group(tuple(run), targets[run[0]][1], tuple(targets[t][0] for t in run)) for run in runs]

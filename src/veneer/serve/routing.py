"""Which tokens of the batch at hand use which adapters, and the linears that add their updates.

Legend: T tokens, I input width, O output width, R the pool's rank, n targets of a group, P places of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.serve.pool import Group, Pool, Stack

Uses = tuple[tuple[int, float], ...]
"""A row's adapters: (place, weight) pairs; none for the base alone."""


class Plan(Protocol):
    """How a batch's tokens meet the pool's factors."""

    def shrink(self, x: Tensor, stack: Stack) -> object:
        """x (T, I) → whatever `expand` needs, (·, n·R) per token."""

    def expand(self, hidden: object, stack: Stack, ys: Sequence[Tensor]) -> None:
        """Add each target's update to its y (T, O) in place; rows without an adapter are not touched."""


class Segments:
    """Runs of tokens that share their adapters: dense products on slices. For prompts, and for few adapters."""

    def __init__(self, segments: Sequence[tuple[int, int, Uses]]) -> None:
        self.segments: list[tuple[int, int, Uses]] = []
        for start, end, uses in segments:
            if self.segments and self.segments[-1][1:] == (start, uses):
                start = self.segments.pop()[0]
            self.segments.append((start, end, uses))
        self.segments = [s for s in self.segments if s[2]]

    def shrink(self, x: Tensor, stack: Stack) -> list[Tensor]:
        """Each use's h = x Aᵀ."""
        return [torch.mm(x[start:end], stack.A[place]) for start, end, uses in self.segments for place, _ in uses]

    def expand(self, hidden: list[Tensor], stack: Stack, ys: Sequence[Tensor]) -> None:
        """y[start:end] += w · h Bᵀ."""
        rank, entries = stack.B[0].shape[1], iter(hidden)
        for start, end, uses in self.segments:
            for place, weight in uses:
                for h, B, y in zip(next(entries).split(rank, 1), stack.B, ys):
                    if y.dtype == h.dtype:
                        y[start:end].addmm_(h, B[place], alpha=weight)
                    else:
                        y[start:end].add_(torch.mm(h, B[place]), alpha=weight)


class Rows:
    """One token a row, many adapters: entries sorted by place, and one batched product over the places in use.

    A place with fewer entries than the most is filled up; its surplus products are thrown away. The order is found once
    for a step. Where row n uses the n-th place alone, x and y are taken as they lie.
    """

    def __init__(self, rows: Sequence[Uses], device: torch.device) -> None:
        entries = sorted((place, row, weight) for row, uses in enumerate(rows) for place, weight in uses)
        counts: dict[int, int] = {}
        slots, source = [], []
        low, high = entries[0][0], entries[-1][0] + 1
        most = max(sum(1 for e in entries if e[0] == place) for place in {e[0] for e in entries})
        source = [0] * ((high - low) * most)
        for place, row, _ in entries:
            at = (place - low) * most + counts.get(place, 0)
            counts[place] = counts.get(place, 0) + 1
            slots.append(at)
            source[at] = row
        self.places, self.most = slice(low, high), most
        owners, weights = [row for _, row, _ in entries], [weight for *_, weight in entries]
        self.plain = most == 1 and slots == list(range(len(slots))) and all(weight == 1 for weight in weights)
        self.start = owners[0]
        self.plain &= owners == list(range(self.start, self.start + len(owners)))
        self.count = len(entries)
        if not self.plain:
            self.source, self.slots = torch.tensor(source, device=device), torch.tensor(slots, device=device)
            self.owners = torch.tensor(owners, device=device)
            self.whole = slots == list(range(len(source)))
            self.weights = None if all(w == 1 for w in weights) else torch.tensor(weights, device=device).unsqueeze(1)

    def shrink(self, x: Tensor, stack: Stack) -> Tensor:
        """(P', most, n·R) over the span of places in use."""
        x = x[self.start : self.start + self.count] if self.plain else x.index_select(0, self.source)
        return torch.bmm(x.view(-1, self.most, x.shape[-1]), stack.A[self.places])

    def expand(self, hidden: Tensor, stack: Stack, ys: Sequence[Tensor]) -> None:
        """y[row] += w · h Bᵀ for every entry."""
        for h, B, y in zip(hidden.split(stack.B[0].shape[1], 2), stack.B, ys):
            self._add(torch.bmm(h, B[self.places]).flatten(0, 1), y)

    def _add(self, update: Tensor, y: Tensor) -> None:
        if self.plain:
            y[self.start : self.start + self.count].add_(update)
            return
        if not self.whole:
            update = update.index_select(0, self.slots)
        if self.weights is not None:
            update = update * self.weights.to(update.dtype)
        y.index_add_(0, self.owners, update.to(y.dtype))


class Grouped:
    """As `Segments`, on a GPU: all adapters in one product. Segments are in the order of places, the base's first."""

    def __init__(self, segments: Sequence[tuple[int, int, Uses]], places: int, device: torch.device) -> None:
        self.start = next(start for start, _, uses in segments if uses)
        counts = [0] * places
        for start, end, uses in segments:
            for place, _ in uses:
                counts[place] += end - start
        self.ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)

    @staticmethod
    def takes(segments: Sequence[tuple[int, int, Uses]], x: Tensor) -> bool:
        """Whether these segments can be one product: at most one adapter each, unweighted, in half precision."""
        plain = all(len(uses) <= 1 and all(weight == 1 for _, weight in uses) for *_, uses in segments)
        ordered = [uses[0][0] if uses else -1 for *_, uses in segments]
        return plain and ordered == sorted(ordered) and ordered[-1] >= 0 and x.is_cuda and x.dtype == torch.bfloat16

    def shrink(self, x: Tensor, stack: Stack) -> Tensor:
        """(T', n·R) for the tokens that have an adapter."""
        return F.grouped_mm(x[self.start :], stack.A, offs=self.ends)

    def expand(self, hidden: Tensor, stack: Stack, ys: Sequence[Tensor]) -> None:
        """y += h Bᵀ."""
        for h, B, y in zip(hidden.split(stack.B[0].shape[1], 1), stack.B, ys):
            y[self.start :].add_(F.grouped_mm(h.contiguous(), B, offs=self.ends))


def plan_rows(rows: Sequence[Uses], device: torch.device) -> Plan | None:
    """A plan for one token a row; None where no row has an adapter."""
    used = {place for uses in rows for place, _ in uses}
    if not used:
        return None
    runs = Segments([(n, n + 1, uses) for n, uses in enumerate(rows)])
    if len(runs.segments) <= 2 or max(used) - min(used) >= 3 * len(used):
        return runs
    return Rows(rows, device)


@dataclass
class Routing:
    """The plan of the batch that is in the model now; what every `RoutedLinear` reads."""

    body: Plan | None = None
    head: Plan | None = None
    """For the output head, which may see the last tokens alone."""


class GroupState:
    """What the linears of one group share while the model runs: the plan, and their outputs for the input at hand."""

    def __init__(self, group: Group, layers: Sequence[nn.Module], pool: Pool, routing: Routing, is_head: bool) -> None:
        self.group, self.layers, self.pool, self.routing, self.is_head = group, layers, pool, routing, is_head
        self.source: Tensor | None = None
        self.outputs: list[Tensor] = []

    def output(self, x: Tensor, part: int) -> Tensor:
        """x (…, I) → (…, O) of one of the group's targets; the first that is asked for computes all of them."""
        plan = self.routing.head if self.is_head else self.routing.body
        stack = self.pool.stacks.get(self.group)
        if plan is None or stack is None:
            return self.layers[part](x)
        if self.source is not x:
            self.source, self.outputs = x, self._outputs(x, plan, stack)
        y = self.outputs[part]
        if part == len(self.layers) - 1:
            self.source, self.outputs = None, []
        return y

    def _outputs(self, x: Tensor, plan: Plan, stack: Stack) -> list[Tensor]:
        rows = x.reshape(-1, x.shape[-1]).to(stack.A.dtype)
        hidden = plan.shrink(rows, stack)
        flat = [y.reshape(-1, y.shape[-1]) for y in (layer(x) for layer in self.layers)]
        plan.expand(hidden, stack, flat)
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in flat]


class RoutedLinear(nn.Module):
    """A linear of the base, with the update of each token's adapters: y[t] = base(x[t]) + Σ w s B A x[t]."""

    def __init__(self, base_layer: nn.Module, state: GroupState, part: int) -> None:
        super().__init__()
        self.base_layer, self.part = base_layer, part
        self.__dict__["state"] = state

    def forward(self, x: Tensor) -> Tensor:
        return self.state.output(x, self.part)

    @property
    def weight(self) -> Tensor:
        """The base's weight: models look at it for its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

"""A frozen linear over a packed row whose token ranges belong to different adapters, forward and backward.

One product of all tokens with W, and beside it each adapter's own on its range; autograd functions that save x alone.
Two ways: a loop over the ranges with in-place products, in which no value of one range can reach another (not even
NaN); and stacked factors with a mask, few large products for a GPU, exact for finite values. Compiled code gets a `Stack`
made outside of it, so that neither its size nor what it has to check grows with the number of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weight = Tensor | Callable[[torch.dtype], Tensor]
"""W (O, I), or a function that dequantises it."""


@dataclass(frozen=True)
class Ranges:
    """Which adapter each of T packed tokens belongs to: adapters have one contiguous range each, which cover the row.

    `bounds` maps name → (start, end), `number` name → the adapter's number, `owner` (T, int64) holds each token's number.
    """

    bounds: dict[str, tuple[int, int]]
    number: dict[str, int]
    owner: Tensor
    _columns: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, lengths: Mapping[str, int], device: torch.device) -> Ranges:
        """From the length of each adapter's range, in order; a length may be 0."""
        bounds, at = {}, 0
        for name, length in lengths.items():
            bounds[name] = at, at + length
            at += length
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(list(lengths.values())))
        number = {name: i for i, name in enumerate(lengths)}
        return cls(bounds, number, owner.to(device, non_blocking=True))

    @property
    def tokens(self) -> int:
        return self.owner.shape[0]

    def mask(self, names: Sequence[str], ranks: Sequence[int]) -> Tensor:
        """(T, Σ ranks) bool: whether a token belongs to the adapter of a column."""
        own = [(self.owner == self.number[name]).unsqueeze(1).expand(-1, rank) for name, rank in zip(names, ranks)]
        return torch.cat(own, dim=1)

    def columns(
        self, names: Sequence[str], ranks: Sequence[int], scaling: Sequence[float], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The number (int64) and the scaling (in `dtype`) of each column's adapter, (Σ ranks) each; made once and kept."""
        key = *names, *ranks, *scaling, dtype
        if key not in self._columns:
            repeats = torch.tensor(ranks)
            values = torch.tensor([self.number[name] for name in names]), torch.tensor(scaling, dtype=dtype)
            self._columns[key] = tuple(v.repeat_interleave(repeats).to(self.owner.device) for v in values)
        return self._columns[key]


class Stack(NamedTuple):
    """The factors of several adapters on one linear side by side, with R = Σ R_n.

    `lora_A` (R, I) and `lora_B` (O, R), which holds s_n·B_n, are in the dtype that the linear computes in; `owner` (R,
    int64) holds the number (`Ranges.number`) of each rank's adapter.
    """

    lora_A: Tensor
    lora_B: Tensor
    owner: Tensor

    @classmethod
    def of(
        cls,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scaling: Sequence[float],
        names: Sequence[str],
        ranges: Ranges,
        dtype: torch.dtype,
    ) -> Stack:
        """In a few kernels whatever their number; autograd hands a stack's gradient on to its adapters as views."""
        owner, scales = ranges.columns(names, [a.shape[0] for a in lora_A], scaling, lora_B[0].dtype)
        return cls(torch.cat(list(lora_A)).to(dtype), (torch.cat(list(lora_B), dim=1) * scales).to(dtype), owner)


def stack(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float], dtype: torch.dtype):
    """All A as (Σ R_n, I) and all s_n·B_n as (O, Σ R_n), in `dtype`."""
    a = torch.cat([a.to(dtype) for a in lora_A])
    return a, torch.cat([(b if s == 1 else b * s).to(dtype) for b, s in zip(lora_B, scaling)], dim=1)


def stacked_lora_linear(x: Tensor, weight: Weight, bias: Tensor | None, factors: Stack, ranges: Ranges) -> Tensor:
    """y = x Wᵀ + bias + (mask ∘ x Aᵀ)(s B)ᵀ: a token has the ranks of its own adapter. For compiled code."""
    a, b, owner = factors
    mask = ranges.owner.unsqueeze(1) == owner
    if not isinstance(weight, Tensor):  # the dense weight must not be kept for the backward pass
        return StackedLora.apply(x, weight, bias, mask, (1,), a, b)
    low = F.linear(x, a)  # plain: the compiler fuses it better, and picks what to keep
    return F.linear(x, weight, bias) + F.linear(torch.where(mask, low, torch.zeros_like(low)), b)


class StackedLora(torch.autograd.Function):
    """The stacked products without a temporary of the output's size, keeping x and not x Aᵀ."""

    @staticmethod
    def forward(ctx, x, weight, bias, mask, scaling, *factors):
        x2 = x.reshape(-1, x.shape[-1])
        a, b = stack(factors[::2], factors[1::2], scaling, x.dtype)
        y = F.linear(x, _dense(weight, x.dtype), bias)
        y.view(-1, y.shape[-1]).addmm_((x2 @ a.t()).masked_fill_(~mask, 0), b.t())
        _save(ctx, x, weight, factors)
        ctx.mask, ctx.scaling = mask, scaling
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, *factors = ctx.saved_tensors  # read once: a checkpointed block computes them again
        mask = ctx.mask
        g, x2 = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        a, b = stack(factors[::2], factors[1::2], ctx.scaling, g.dtype)
        u = (g @ b).masked_fill_(~mask, 0)
        grad_x = (g @ _kept(ctx, weight, g.dtype)).addmm_(u, a).view_as(x) if ctx.needs_input_grad[0] else None
        ranks = [f.shape[0] for f in factors[::2]]
        grads_a = (u.t() @ x2).split(ranks)
        grads_b = (g.t() @ (x2 @ a.t()).masked_fill_(~mask, 0)).split(ranks, dim=1)
        found = []
        for n, s in enumerate(ctx.scaling):
            found += [grads_a[n].to(factors[2 * n].dtype), grads_b[n].to(factors[2 * n + 1].dtype) * s]
        return grad_x, None, None, None, None, *_wanted(ctx, found)


class RangedLora(torch.autograd.Function):
    """`veneer.kernels.reference.ranged_lora_linear` as a loop over the ranges, in place."""

    @staticmethod
    def forward(ctx, x, weight, bias, bounds, scaling, *factors):
        y = F.linear(x, _dense(weight, x.dtype), bias)
        x2, y2 = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for (start, end), s, a, b in zip(bounds, scaling, factors[::2], factors[1::2]):
            if start < end:
                low = x2[start:end] @ a.to(x.dtype).t()
                y2[start:end].addmm_(low, b.to(x.dtype).t(), alpha=s)
        _save(ctx, x, weight, factors)
        ctx.bounds, ctx.scaling = bounds, scaling
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, *factors = ctx.saved_tensors  # read once: a checkpointed block computes them again
        g, x2 = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = g @ _kept(ctx, weight, g.dtype) if ctx.needs_input_grad[0] else None
        found = []
        for n, ((start, end), s) in enumerate(zip(ctx.bounds, ctx.scaling)):
            if start == end:
                found += [None, None]
                continue
            gn, xn, (a, b) = g[start:end], x2[start:end], factors[2 * n : 2 * n + 2]
            a_cast = a.to(g.dtype)
            u = (gn @ b.to(g.dtype)).mul_(s)
            if grad_x is not None:
                grad_x[start:end].addmm_(u, a_cast)
            grad_a = (u.t() @ xn).to(a.dtype) if ctx.needs_input_grad[5 + 2 * n] else None
            found += [grad_a, (gn.t() @ (xn @ a_cast.t())).mul_(s).to(b.dtype)]
        return (None if grad_x is None else grad_x.view_as(x)), None, None, None, None, *_wanted(ctx, found)


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight(dtype)


def _save(ctx, x: Tensor, weight: Weight, factors: Sequence[Tensor]) -> None:
    dense = isinstance(weight, Tensor)
    ctx.save_for_backward(x, weight if dense else None, *factors)
    ctx.dequantise = None if dense else weight


def _kept(ctx, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    return ctx.dequantise(dtype) if weight is None else weight


def _wanted(ctx, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(found, ctx.needs_input_grad[5:], strict=True)]


def ranged_lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    names: Sequence[str],
    ranges: Ranges,
) -> Tensor:
    """Fast path of `veneer.kernels.reference.ranged_lora_linear`; the weight gets no gradient."""
    factors = [f for pair in zip(lora_A, lora_B) for f in pair]
    if torch.compiler.is_compiling() or x.is_cuda:
        mask = ranges.mask(names, [a.shape[0] for a in lora_A])
        return StackedLora.apply(x, weight, bias, mask, tuple(scaling), *factors)
    bounds = tuple(ranges.bounds[name] for name in names)
    return RangedLora.apply(x, weight, bias, bounds, tuple(scaling), *factors)

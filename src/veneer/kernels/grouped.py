"""Each row its own adapter, forward and backward: rows are sorted by adapter, and each adapter takes its run at once.

Legend: T rows, I input width, O output width, R rank, n adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_lora(
    x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float], rows: Tensor
) -> Tensor:
    """`veneer.kernels.reference.grouped_lora` with `rows`; saves x alone for the backward pass."""
    tokens = x.numel() // (x.shape[0] * x.shape[-1]) if x.numel() else 1
    flat = x.reshape(-1, x.shape[-1])
    each = rows if tokens == 1 else rows.repeat_interleave(tokens)
    order, runs = sort_rows(each, len(lora_A))
    if not runs:
        return x.new_zeros(*x.shape[:-1], lora_B[0].shape[0])
    if _grouped_mm_takes(x):
        update = _by_grouped_mm(flat, lora_A, lora_B, scaling, order, runs)
    else:
        factors = [t for pair in zip(lora_A, lora_B) for t in pair]
        update = _Runs.apply(flat, order, runs, tuple(scaling), *factors)
    return update.view(*x.shape[:-1], update.shape[-1])


def sort_rows(rows: Tensor, count: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """rows (T) of adapter numbers, -1 for none → (rows with an adapter in the order of adapters, runs).

    A run (start, end, n) says which part of that order is adapter n's.
    """
    order = torch.argsort(rows, stable=True)
    counts = torch.bincount(rows + 1, minlength=count + 1).tolist()
    order, runs, at = order[counts[0] :], [], 0
    for n, many in enumerate(counts[1:]):
        if many:
            runs.append((at, at + many, n))
            at += many
    return order, runs


class _Runs(torch.autograd.Function):
    """Dense products, run by run."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, runs, scaling, *factors: Tensor) -> Tensor:
        """x (T, I) → (T, O), zeros where no run has a row."""
        ctx.save_for_backward(x, order, *factors)
        ctx.runs, ctx.scaling = runs, scaling
        sorted_x, parts = x.index_select(0, order), []
        for start, end, n in runs:
            a, b = (f.to(x.dtype) for f in factors[2 * n : 2 * n + 2])
            parts.append(scaling[n] * F.linear(F.linear(sorted_x[start:end], a), b))
        return x.new_zeros(x.shape[0], factors[1].shape[0]).index_copy_(0, order, torch.cat(parts))

    @staticmethod
    def backward(ctx, grad: Tensor):
        """dx = s B A g, dA = s (Bᵀ g)ᵀ x, dB = s gᵀ (x Aᵀ), each over its run."""
        x, order, *factors = ctx.saved_tensors
        sorted_x, sorted_g = x.index_select(0, order), grad.index_select(0, order)
        grads: list[Tensor | None] = [None] * len(factors)
        parts = []
        for start, end, n in ctx.runs:
            (a, b), own_x, g = factors[2 * n : 2 * n + 2], sorted_x[start:end], ctx.scaling[n] * sorted_g[start:end]
            inner = g @ b.to(x.dtype)
            parts.append(inner @ a.to(x.dtype))
            if ctx.needs_input_grad[4 + 2 * n]:
                grads[2 * n] = (inner.t() @ own_x).to(a.dtype)
            if ctx.needs_input_grad[5 + 2 * n]:
                grads[2 * n + 1] = (g.t() @ F.linear(own_x, a.to(x.dtype))).to(b.dtype)
        dx = torch.zeros_like(x).index_copy_(0, order, torch.cat(parts)) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *grads


def has_grouped_mm() -> bool:
    """Whether this torch has one product for all groups."""
    return hasattr(F, "grouped_mm")


def _grouped_mm_takes(x: Tensor) -> bool:
    return has_grouped_mm() and x.is_cuda and x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0


def _by_grouped_mm(
    x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float], order: Tensor, runs
) -> Tensor:
    """One product for all shrinks and one for all expands, over factors filled up to one rank; autograd knows both."""
    used = [n for *_, n in runs]
    rank, width = -(-max(lora_A[n].shape[0] for n in used) // 16) * 16, lora_B[0].shape[0]
    wide = -(-width // 8) * 8
    a = torch.stack([F.pad(lora_A[n].to(x.dtype).t(), (0, rank - lora_A[n].shape[0])) for n in used])
    b = torch.stack(
        [F.pad((scaling[n] * lora_B[n]).to(x.dtype).t(), (0, wide - width, 0, rank - lora_B[n].shape[1])) for n in used]
    )
    ends = torch.tensor([end for _, end, _ in runs], dtype=torch.int32, device=x.device)
    update = F.grouped_mm(F.grouped_mm(x.index_select(0, order), a, offs=ends), b, offs=ends)[:, :width]
    return update.new_zeros(x.shape[0], width).index_copy(0, order, update)

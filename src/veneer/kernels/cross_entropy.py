"""Output head + cross-entropy in chunks of positions: the full logits never exist."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""Float32 logits of one chunk: 64 MiB keep the products large and the peak small."""
GPU_CHUNK_BYTES = 256 << 20
"""The same for logits in the head's own dtype on a GPU, whose products want more rows."""


FEWEST_ROWS = 512
"""Positions of a chunk on a GPU that a short row is not cut below: fewer make the products slow."""


def chunk_rows(positions: int, row_bytes: int) -> int:
    """Positions of a chunk on a GPU: as the limit has it, and a quarter of a short row, so that a chunk's logits weigh no
    more than a block's work."""
    return max(1, min(GPU_CHUNK_BYTES // row_bytes, max(FEWEST_ROWS, positions // 4)))


class LinearCrossEntropy(torch.autograd.Function):
    """`veneer.kernels.reference.linear_cross_entropy` for a frozen head, position by position: (N) float32.

    The gradient of the hidden states is made in the forward pass, chunk by chunk: ∂L/∂z = softmax(z) − onehot, times
    the derivative of the soft-cap and scale, times W. The head gets no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, logit_scale):
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        if hidden.is_cuda and grad is not None:
            return _on_gpu(ctx, hidden, weight, bias, targets, softcap, logit_scale, grad)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            z = F.linear(hidden[part], weight, bias).float()
            z = z.mul_(logit_scale) if logit_scale != 1.0 else z
            z = z.div_(softcap).tanh_().mul_(softcap) if softcap is not None else z
            lse = torch.logsumexp(z, -1, keepdim=True)
            there = (targets[part] >= 0).unsqueeze(-1)
            wanted = targets[part].clamp_min(0).unsqueeze(-1)
            losses[part] = ((lse - z.gather(-1, wanted)) * there).squeeze(-1)
            if grad is None:
                continue
            slope = z.div(softcap).square_().neg_().add_(1) if softcap is not None else None
            p = z.sub_(lse).exp_()
            p.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=p.dtype))
            p = p.mul_(slope) if slope is not None else p
            p = p.mul_(logit_scale) if logit_scale != 1.0 else p
            grad[part] = p.mul_(there).to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        (grad,) = ctx.saved_tensors
        return grad * grad_losses.to(grad.dtype).unsqueeze(-1), None, None, None, None, None


def loss_and_slope(z: Tensor, targets: Tensor, softcap: float | None, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Logits z (N, V) of the head → (−log softmax(z′)[target], (N) float32, its derivative by z in z's dtype).

    z′ = cap·tanh(c·z/cap), or c·z. Rows with a target below 0 count for nothing.
    """
    scaled = z.float() * logit_scale
    capped = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
    lse = torch.logsumexp(capped, -1, keepdim=True)
    there, wanted = (targets >= 0).unsqueeze(-1).float(), targets.clamp_min(0).unsqueeze(-1)
    loss = ((lse - capped.gather(-1, wanted)) * there).squeeze(-1)
    onehot = torch.arange(z.shape[-1], device=z.device) == wanted
    slope = (torch.exp(capped - lse) - onehot.float()) * (logit_scale * there)
    if softcap is not None:
        slope = slope * (1 - (capped / softcap).square())
    return loss, slope.to(z.dtype)


@cache
def _fastest() -> Callable[..., tuple[Tensor, Tensor]]:
    """`loss_and_slope`, or where triton is there its kernel."""
    if find_spec("triton") is None:
        return loss_and_slope
    from veneer.kernels import cross_entropy_triton

    return cross_entropy_triton.loss_and_slope


def _on_gpu(ctx, hidden, weight, bias, targets, softcap, logit_scale, grad):
    """The forward pass on a GPU: the element-wise part of each chunk is one kernel, and its slope lies where logits did."""
    rows = chunk_rows(hidden.shape[0], weight.element_size() * weight.shape[0])
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    step = _fastest() if hidden.dtype != torch.float64 else loss_and_slope
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        losses[part], slope = step(F.linear(hidden[part], weight, bias), targets[part], softcap, logit_scale)
        torch.mm(slope, weight, out=grad[part])
    ctx.save_for_backward(grad)
    return losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """Fast path of `veneer.kernels.reference.linear_cross_entropy`; `weight` and `bias` get no gradient."""
    losses = LinearCrossEntropy.apply(hidden, weight, bias, targets, softcap, logit_scale)
    return losses.sum() if reduction == "sum" else losses

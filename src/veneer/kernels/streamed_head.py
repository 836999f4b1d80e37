"""Output head + cross-entropy over a vocabulary that comes in pieces: one pass, as in attention over blocks of keys.

With z the logits, p = softmax(z) and W the head, ∂L/∂h = p W − W[target]. As pieces W_c come, a running maximum m, the
sum s of exp(z − m) and a of exp(z − m) W_c are kept, and the last two are rescaled when m grows (Milakov & Gimelshein
2018, arXiv:1805.02867); at the end ∂L/∂h = a/s − W[target]. Each piece is wanted once per `ROWS` positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.compiling import compile_or_plain

ROWS = 8192
"""Positions taken at once: they bound the memory, which does not depend on the vocabulary."""
LOGITS = 64 << 20
"""Bytes of the logits that are there at once, and of their slopes: larger pieces are taken in parts of their rows."""
Pieces = Callable[[], Iterable[tuple[int, Tensor]]]
"""Gives (first row, rows of W) from the start of the vocabulary to its end."""


def fold(
    z: Tensor, place: Tensor, m: Tensor, s: Tensor, wanted: Tensor, softcap: float | None, logit_scale: float
) -> tuple[Tensor, ...]:
    """One piece's logits z (N, C) into the running m, s and wanted logit (N, 1), float32; `place` (N, 1): target's column.

    Returns m, s, the wanted logit, exp(m_before − m), and two slopes: exp(z′ − m)·∂z′/∂z (N, C) in z's dtype, and
    ∂z′/∂z at the target (N, 1), zero where it is in another piece. z′ = cap·tanh(c·z/cap), or c·z.
    """
    scaled = z.float() * logit_scale
    capped = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
    top = torch.maximum(m, capped.amax(-1, keepdim=True))
    e, rescale = torch.exp(capped - top), torch.exp(m - top)
    s = s * rescale + e.sum(-1, keepdim=True)
    hit = torch.arange(z.shape[-1], device=z.device) == place
    wanted = wanted + torch.where(hit, capped, 0.0).sum(-1, keepdim=True)
    slope = logit_scale if softcap is None else logit_scale * (1 - (capped / softcap).square())
    at_target = torch.where(hit, slope, 0.0).sum(-1, keepdim=True)
    return top, s, wanted, rescale, (e * slope).to(z.dtype), at_target


_compiled: Callable | None = None


class StreamedCrossEntropy(torch.autograd.Function):
    """Each position's loss, (N) float32; its hidden state's gradient is made in the forward pass, the head gets none."""

    @staticmethod
    def forward(ctx, hidden, pieces, bias, targets, softcap, logit_scale):
        global _compiled
        step = fold
        if hidden.is_cuda:
            step = _compiled = _compiled or compile_or_plain(fold)
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], ROWS):
            part = slice(start, start + ROWS)
            own = None if grad is None else grad[part]
            losses[part] = _rows(step, hidden[part], pieces, bias, targets[part, None], softcap, logit_scale, own)
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        (grad,) = ctx.saved_tensors
        return grad * grad_losses.to(grad.dtype).unsqueeze(-1), None, None, None, None, None


def _rows(step, h, pieces, bias, targets, softcap, logit_scale, grad) -> Tensor:
    """The losses (n) of some positions; fills `grad` with their gradient."""
    s, wanted = (torch.zeros(len(h), 1, dtype=torch.float32, device=h.device) for _ in range(2))
    m = torch.full_like(s, float("-inf"))
    a = None if grad is None else torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    for first, weight in _smaller(pieces(), max(1, LOGITS // (len(h) * h.element_size()))):
        z = F.linear(h, weight, None if bias is None else bias[first : first + len(weight)])
        place = targets - first
        m, s, wanted, rescale, slope, at_target = step(z, place, m, s, wanted, softcap, logit_scale)
        del z
        if grad is not None:
            a.mul_(rescale).add_(slope @ weight)
            grad.addcmul_(weight[place.clamp(0, len(weight) - 1).squeeze(-1)], at_target.to(grad.dtype))
        del slope
    if grad is not None:
        torch.sub(a.div_(s), grad, out=a)
        grad.copy_(a)
    return (s.log() + m - wanted).squeeze(-1)


def _smaller(pieces: Iterable[tuple[int, Tensor]], rows: int) -> Iterator[tuple[int, Tensor]]:
    """The same pieces in parts of at most so many rows, of nearly one size."""
    for first, weight in pieces:
        for part in weight.chunk(-(-len(weight) // rows)):
            yield first, part
            first += len(part)


def streamed_cross_entropy(
    hidden: Tensor,
    pieces: Pieces,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """`veneer.kernels.reference.linear_cross_entropy` with W in pieces: hidden (N, d), targets (N) → (N) or scalar."""
    losses = StreamedCrossEntropy.apply(hidden, pieces, bias, targets, softcap, logit_scale)
    return losses.sum() if reduction == "sum" else losses

"""Linear + LoRA as one autograd function that saves x alone, or with a frozen A only x Aᵀ.

Plain autograd keeps x for the adapter, x Aᵀ, and makes temporaries of the output's size for `+` and `s·`; this keeps
one x, recomputes x Aᵀ (R columns: cheap) and accumulates into the buffers that the dense products write. Where A is
frozen (LoRA-FA, arXiv:2308.03303) no gradient needs x: x Aᵀ is kept in its place, R columns in place of I.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """`veneer.kernels.reference.lora_linear` with one buffer of the output's size, and h = x Aᵀ (T, R)."""
    y = F.linear(x, weight, bias)
    low = x.reshape(-1, x.shape[-1]) @ lora_A.to(x.dtype).t()
    y.view(-1, y.shape[-1]).addmm_(low, lora_B.to(x.dtype).t(), alpha=scaling)
    return y, low


def kept(needs: tuple[bool, ...], x: Tensor, low: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What `backward` wants of x and h: x if A is trained, else h if B is, else neither."""
    _, _, _, need_a, need_b, _ = needs
    return x if need_a else None, low if need_b and not need_a else None


def backward(
    needs: tuple[bool, ...],
    grad: Tensor,
    x: Tensor | None,
    low: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, lora_A, lora_B, scaling), None where `needs` says no; the weight's is always None.

    With g = ∂L/∂y, h = x Aᵀ and u = s·g B:  ∂L/∂A = uᵀ x,  ∂L/∂B = s·gᵀ h,  ∂L/∂x = g W + u A,  ∂L/∂bias = Σ g.
    x and h are what `kept` gave.
    """
    g = grad.reshape(-1, grad.shape[-1])
    a, b = lora_A.to(g.dtype), lora_B.to(g.dtype)
    need_x, _, need_bias, need_a, need_b, _ = needs
    x = x.reshape(-1, x.shape[-1]) if need_a else None
    u = (g @ b).mul_(scaling) if need_x or need_a else None
    grad_x = (g @ weight).addmm_(u, a).view(*grad.shape[:-1], -1) if need_x else None
    grad_a = (u.t() @ x).to(lora_A.dtype) if need_a else None
    grad_b = (g.t() @ (x @ a.t() if need_a else low)).mul_(scaling).to(lora_B.dtype) if need_b else None
    return grad_x, None, g.sum(0) if need_bias else None, grad_a, grad_b, None


class LoraLinear(torch.autograd.Function):
    """Forward and backward of `veneer.kernels.reference.lora_linear` for a frozen weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling):
        y, low = forward(x, weight, bias, lora_A, lora_B, scaling)
        ctx.save_for_backward(*kept(ctx.needs_input_grad, x, low), weight, lora_A, lora_B)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad):
        return backward(ctx.needs_input_grad, grad, *ctx.saved_tensors, ctx.scaling)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Fast path of `veneer.kernels.reference.lora_linear`; `weight` gets no gradient."""
    return LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling)


class DoraLinear(torch.autograd.Function):
    """Forward and backward of `veneer.kernels.reference.dora_linear` for a frozen weight.

    With u = x Wᵀ + s·x Aᵀ Bᵀ, c = m/norm and g = ∂L/∂y: ∂L/∂m = Σ_t (g∘u)/norm; all else is `LoraLinear`'s with g∘c in
    g's place. u is not kept: y is (the next operation keeps it as well, as a rule), and u = (y − bias)/c.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, magnitude, norm, scaling):
        c = (magnitude / norm).to(x.dtype)
        y = F.linear(x, weight)
        y2 = y.view(-1, y.shape[-1])
        y2.addmm_(x.reshape(-1, x.shape[-1]) @ lora_A.to(x.dtype).t(), lora_B.to(x.dtype).t(), alpha=scaling)
        y2.mul_(c)
        if bias is not None:
            y2.add_(bias)
        ctx.save_for_backward(x, weight, bias, lora_A, lora_B, magnitude, norm, y)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, lora_A, lora_B, magnitude, norm, y = ctx.saved_tensors
        x2, g2, y2 = (t.reshape(-1, t.shape[-1]) for t in (x, grad, y))
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        need_x, _, need_bias, need_a, need_b, need_m, _, _ = ctx.needs_input_grad
        grad_m = None
        if need_m:  # Σ g∘(y − bias) = c Σ g∘u, and the division by c·norm = m
            wide = torch.promote_types(g2.dtype, torch.float32)
            total = torch.linalg.vecdot(g2.to(wide), y2.to(wide), dim=0)
            total = total if bias is None else total - bias * g2.sum(0, dtype=wide)
            grad_m = (total / magnitude).to(magnitude.dtype)
        grad_bias = g2.sum(0) if need_bias else None
        g2 = g2 * (magnitude / norm).to(g2.dtype)
        u = (g2 @ b).mul_(ctx.scaling) if need_x or need_a else None
        grad_x = (g2 @ weight).addmm_(u, a).view_as(x) if need_x else None
        grad_a = (u.t() @ x2).to(lora_A.dtype) if need_a else None
        grad_b = (g2.t() @ (x2 @ a.t())).mul_(ctx.scaling).to(lora_B.dtype) if need_b else None
        return grad_x, None, grad_bias, grad_a, grad_b, grad_m, None, None


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
) -> Tensor:
    """Fast path of `veneer.kernels.reference.dora_linear`; `weight` and `norm` get no gradient."""
    return DoraLinear.apply(x, weight, bias, lora_A, lora_B, magnitude, norm, scaling)

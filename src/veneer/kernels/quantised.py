"""Quantised linear + LoRA as one autograd function: it keeps x and the packed weight, never a float copy of W.

The weight is dequantised in the forward pass, dropped, and dequantised again in the backward pass. Where A is
frozen x Aᵀ is kept in place of x, as in `lora.LoraLinear`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.kernels import lora

Dequantise = Callable[[torch.dtype], Tensor]


class QuantisedLoraLinear(torch.autograd.Function):
    """`veneer.kernels.reference.quantised_lora_linear`; the gradients are those of `lora.LoraLinear`."""

    @staticmethod
    def forward(ctx, x, dequantise, bias, lora_A, lora_B, scaling):
        y, low = lora.forward(x, dequantise(x.dtype), bias, lora_A, lora_B, scaling)
        ctx.save_for_backward(*lora.kept(ctx.needs_input_grad, x, low), lora_A, lora_B)
        ctx.dequantise, ctx.scaling = dequantise, scaling
        return y

    @staticmethod
    def backward(ctx, grad):
        x, low, lora_A, lora_B = ctx.saved_tensors
        weight = ctx.dequantise(grad.dtype) if ctx.needs_input_grad[0] else None
        return lora.backward(ctx.needs_input_grad, grad, x, low, weight, lora_A, lora_B, ctx.scaling)


def quantised_lora_linear(
    x: Tensor, dequantise: Dequantise, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Fast path of `veneer.kernels.reference.quantised_lora_linear`; the weight gets no gradient."""
    return QuantisedLoraLinear.apply(x, dequantise, bias, lora_A, lora_B, scaling)

"""The gated activation h = act(g)·u of a multi-layer perceptron (SwiGLU, GeGLU; arXiv:2002.05202) and its backward pass.

One pass over g, u and ∂L/∂h gives both gradients, side by side, and h itself, which then need not be kept. The twin is
`gated_backward_plain`; on a GPU with triton it is one kernel.

Legend: T tokens, O width of h, R rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.operators import define

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(g)·u, of one shape and dtype; `kind` is one of ACTIVATIONS."""
    if kind == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="none" if kind == "gelu" else "tanh") * up


def value_and_slope(g: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """act(g) and act′(g)."""
    if kind == "silu":
        s = torch.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    if kind == "gelu":
        s = 0.5 * (1 + torch.erf(g / math.sqrt(2)))
        return g * s, s + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    s = torch.sigmoid(2 * TANH * (g + CUBIC * g * g * g))  # (1 + tanh z) / 2
    return g * s, s + 2 * g * s * (1 - s) * TANH * (1 + 3 * CUBIC * g * g)


TANH, CUBIC = math.sqrt(2 / math.pi), 0.044715


def gated_backward_plain(gate: Tensor, up: Tensor, grad: Tensor, ranks: int, kind: str) -> Tensor:
    """[∂L/∂g, ∂L/∂u, ·] (T, 2 O + ranks) from g, u and ∂L/∂h (T, O) of one dtype; `grad` becomes h.

    The last columns are left as they are in fresh memory. The definition of `veneer::gated_backward`.
    """
    exact = torch.promote_types(gate.dtype, torch.float32)
    g, u, d = (t.to(exact) for t in (gate, up, grad))
    value, slope = value_and_slope(g, kind)
    wide, width = _shape_only(gate, up, grad, ranks, kind), gate.shape[1]
    wide[:, :width].copy_(d * u * slope)
    wide[:, width : 2 * width].copy_(d * value)
    grad.copy_(value * u)
    return wide


def gated_backward_gpu(gate: Tensor, up: Tensor, grad: Tensor, ranks: int, kind: str) -> Tensor:
    """`gated_backward_plain` as one triton kernel, where triton is there."""
    try:
        from veneer.kernels.gated_triton import gated_backward_into
    except ImportError:
        return gated_backward_plain(gate, up, grad, ranks, kind)
    wide = _shape_only(gate, up, grad, ranks, kind)
    gated_backward_into(wide, gate, up, grad, kind)
    return wide


def _shape_only(gate: Tensor, up: Tensor, grad: Tensor, ranks: int, kind: str) -> Tensor:
    return gate.new_empty(gate.shape[0], 2 * gate.shape[1] + ranks)


define(
    "gated_backward(Tensor gate, Tensor up, Tensor(a!) grad, int ranks, str kind) -> Tensor",
    {"CPU": gated_backward_plain, "CUDA": gated_backward_gpu},
    _shape_only,
)

"""`veneer.kernels.gated` in triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024
"""Elements of a row that one program computes: 16 bytes a thread for half-precision values."""


@triton.jit
def _gated_backward(
    gate, up, grad, wide, width, gate_row, gate_column, up_row, up_column, grad_row, grad_column, wide_row,
    KIND: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < width
    grad_at = grad + row * grad_row + column * grad_column
    g = tl.load(gate + row * gate_row + column * gate_column, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column * up_column, mask=there, other=0.0).to(tl.float32)
    d = tl.load(grad_at, mask=there, other=0.0).to(tl.float32)
    if KIND == "silu":
        s = tl.sigmoid(g)
        slope = s * (1 + g * (1 - s))
    elif KIND == "gelu":
        s = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        slope = s + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        slope = s + g * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * g * g)
    value = g * s
    out = wide + row * wide_row + column
    kept = wide.dtype.element_ty
    tl.store(out, (d * u * slope).to(kept), mask=there)
    tl.store(out + width, (d * value).to(kept), mask=there)
    tl.store(grad_at, (value * u).to(kept), mask=there)


def gated_backward_into(wide: Tensor, gate: Tensor, up: Tensor, grad: Tensor, kind: str) -> None:
    """Write the first 2 O columns of wide (T, ≥ 2 O), rows contiguous, and h over grad; gate, up, grad of any strides."""
    rows, width = gate.shape
    if not rows * width:
        return
    with torch.cuda.device_of(wide):
        _gated_backward[(rows, triton.cdiv(width, COLUMNS))](
            gate, up, grad, wide, width, *gate.stride(), *up.stride(), *grad.stride(), wide.stride(0),
            KIND=kind, COLUMNS=COLUMNS,
        )  # fmt: skip

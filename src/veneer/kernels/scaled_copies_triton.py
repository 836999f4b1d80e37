"""`veneer.kernels.scaled_copies` in triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _copy(table, factors, source_like, target_like, BLOCK: tl.constexpr):
    which = tl.program_id(0)
    row = table + 5 * which
    count, width, stride = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(row).to(tl.pointer_type(source_like.dtype.element_ty))
    target = tl.load(row + 1).to(tl.pointer_type(target_like.dtype.element_ty))
    value = tl.load(source + n, mask=n < count, other=0.0).to(tl.float32) * tl.load(factors + which)
    at = n // width
    tl.store(target + at * stride + (n - at * width), value.to(target_like.dtype.element_ty), mask=n < count)


def launch(table: Tensor, factors: Tensor, source_like: Tensor, target_like: Tensor, longest: int) -> None:
    """Copy all matrices of the table: (source, target, elements, columns, target's row stride) each."""
    with torch.cuda.device_of(table):
        _copy[(table.shape[0], triton.cdiv(longest, BLOCK))](table, factors, source_like, target_like, BLOCK=BLOCK)

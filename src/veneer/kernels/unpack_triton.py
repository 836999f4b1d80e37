"""`veneer.kernels.unpack` in triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 1024
"""Packed bytes that one program reads."""


@triton.jit
def _unpack4(
    packed, code, absmax, nested, nested_code, offset, out, count, width, stride,
    BYTES: tl.constexpr, BLOCK: tl.constexpr, OUTER: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BYTES
    at = start + tl.arange(0, BYTES)
    there = 2 * at < count
    byte = tl.load(packed + at, mask=there, other=0).to(tl.int32)
    block = 2 * at // BLOCK
    if DOUBLE:
        inner = tl.load(absmax + block, mask=there, other=0).to(tl.int32)
        outer = tl.load(nested + block // OUTER, mask=there, other=0.0)
        scale = tl.load(nested_code + inner) * outer + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=there, other=0.0)
    high = tl.load(code + (byte >> 4)) * scale
    low = tl.load(code + (byte & 15)) * scale
    value = tl.interleave(high, low)
    n = 2 * start + tl.arange(0, 2 * BYTES)
    row = n // width
    tl.store(out + row.to(tl.int64) * stride + (n - row * width), value.to(out.dtype.element_ty), mask=n < count)


def unpack_into(
    rows: Tensor, packed: Tensor, code: Tensor, absmax: Tensor, nested: Tensor, nested_code: Tensor, offset: Tensor
) -> None:
    """Write one weight (O, I), a view with rows of any stride; see `veneer.kernels.unpack.unpack`."""
    from veneer.kernels.unpack import BLOCK, NESTED

    count = rows.numel()
    with torch.cuda.device_of(rows):
        _unpack4[(triton.cdiv(count, 2 * BYTES),)](
            packed, code, absmax, nested, nested_code, offset, rows, count, rows.shape[1], rows.stride(0),
            BYTES=BYTES, BLOCK=BLOCK, OUTER=NESTED, DOUBLE=nested.numel() > 0,
        )  # fmt: skip

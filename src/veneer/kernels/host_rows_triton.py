"""`veneer.kernels.host_rows` in triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _host_rows(table, ids, out, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(ids + row)
    value = tl.load(table + source * width + at, mask=at < width)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=at < width)


def launch(table: Tensor, ids: Tensor, out: Tensor) -> None:
    """out[n] ← table[ids[n]]: `table` in pinned host memory, the others on the device."""
    width = table.shape[1]
    with torch.cuda.device_of(out):
        _host_rows[(len(ids), triton.cdiv(width, 1024))](table, ids, out, width, BLOCK=1024)

"""4-bit weights of a group of linears, unpacked with the adapters' factors into the group's one matrix P.

See `veneer.kernels.group` for P. The twin is `veneer.kernels.dequantise.blockwise4_weight`; on a GPU with triton one
kernel reads the packed values and both levels of scales, and writes P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from veneer.kernels.dequantise import blockwise4_weight
from veneer.kernels.operators import define

SHARED = 4
"""A source starts with side (O, R), bottom (R, I), code (16) and nested_code (256); lists by linear follow."""

UNPACK4 = (
    "unpack4(Tensor side, Tensor bottom, Tensor code, Tensor nested_code, Tensor[] packed, Tensor[] absmax, "
    "Tensor[] nested, Tensor[] offset, bool again) -> Tensor"
)


def unpack(source: Sequence[Tensor], again: bool) -> Tensor:
    """P (O+R, I+R) = [W, side; bottom, ·] of a source: SHARED tensors, then packed, absmax, nested, offset by linear.

    W_i[n] = code[q[n]]·absmax_i[n // 64], flattened; absmax is float32, or where nested_i is not empty
    nested_code[absmax_i[b]]·nested_i[b // 256] + offset_i   (QLoRA, arXiv:2305.14314, double quantisation).
    """
    count = (len(source) - SHARED) // 4
    lists = [list(source[SHARED + i * count : SHARED + (i + 1) * count]) for i in range(4)]
    return torch.ops.veneer.unpack4(*source[:SHARED], *lists, again)


def unpack_plain(side, bottom, code, nested_code, packed, absmax, nested, offset, again) -> Tensor:
    """The definition of `veneer::unpack4`."""
    return _filled(unpack_rows_plain, side, bottom, code, nested_code, packed, absmax, nested, offset)


def unpack_rows_plain(
    rows: Tensor, packed: Tensor, code: Tensor, absmax: Tensor, nested: Tensor, nested_code: Tensor, offset: Tensor
) -> None:
    """One W_i of `unpack` into `rows` (O_i, I), a view of any stride."""
    if nested.numel():
        absmax = nested_code[absmax.long()] * nested.repeat_interleave(NESTED)[: absmax.numel()] + offset
    rows.copy_(blockwise4_weight(packed, code, absmax, tuple(rows.shape), BLOCK))


def unpack_rows(rows: Tensor, *source: Tensor) -> None:
    """`unpack_rows_plain`; on a GPU where triton is, one triton kernel."""
    (_gpu_rows() if rows.is_cuda else unpack_rows_plain)(rows, *source)


def _gpu_rows() -> Callable[..., None]:
    try:
        from veneer.kernels.unpack_triton import unpack_into
    except ImportError:
        return unpack_rows_plain
    return unpack_into


def _filled(into: Callable[..., None], side, bottom, code, nested_code, packed, absmax, nested, offset) -> Tensor:
    out = _matrix(side, bottom)
    for rows, q, scales, outer, shift in zip(_rows(out, packed, bottom), packed, absmax, nested, offset):
        into(rows, q, code, scales, outer, nested_code, shift)
    return out


BLOCK, NESTED = 64, 256
"""Values that share a scale, and scales that share a scale of theirs: what bitsandbytes uses for training."""


def _matrix(side: Tensor, bottom: Tensor) -> Tensor:
    (total, ranks), width = side.shape, bottom.shape[1]
    out = side.new_empty(total + ranks, width + ranks)
    out[:total, width:].copy_(side)
    out[total:, :width].copy_(bottom)
    return out


def _rows(out: Tensor, packed: Sequence[Tensor], bottom: Tensor) -> list[Tensor]:
    """The place of each W_i in P."""
    width = bottom.shape[1]
    sizes = [2 * q.numel() // width for q in packed]
    return list(out[: sum(sizes), :width].split(sizes))


def unpack_gpu(side, bottom, code, nested_code, packed, absmax, nested, offset, again) -> Tensor:
    """`unpack_plain` as one triton kernel for each linear, where triton is there."""
    return _filled(_gpu_rows(), side, bottom, code, nested_code, packed, absmax, nested, offset)


def _shape_only(side, bottom, code, nested_code, packed, absmax, nested, offset, again) -> Tensor:
    return side.new_empty(side.shape[0] + side.shape[1], bottom.shape[1] + side.shape[1])


define(UNPACK4, {"CPU": unpack_plain, "CUDA": unpack_gpu}, _shape_only)

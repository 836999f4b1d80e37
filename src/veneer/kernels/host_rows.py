"""Rows of a table in host memory, for indices on a device: the device reads them itself where the memory is pinned."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def host_rows_plain(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """`host_rows` by way of the host, for which the device waits: its definition."""
    return table[ids.cpu()].to(ids.device, dtype)


def host_rows(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """table (V, d) in host memory, ids (N) int64 on a device → its rows (N, d) there, in `dtype`.

    Of pinned memory nothing waits, and a CUDA graph may hold it: each row passes over PCIe once.
    """
    direct = ids.is_cuda and table.is_pinned() and table.is_contiguous() and find_spec("triton") is not None
    if not direct:
        return host_rows_plain(table, ids, dtype)
    from veneer.kernels.host_rows_triton import launch

    out = torch.empty(len(ids), table.shape[1], dtype=dtype, device=ids.device)
    launch(table, ids.contiguous(), out)
    return out

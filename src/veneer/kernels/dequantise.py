"""Packed integer weights back to floats: pure functions, each the definition of its storage format.

Legend: O output width, I input width, G groups along the input, b bits a value.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble n of a 32-bit word of AWQ's GEMM layout (from the low end) holds column AWQ_ORDER[n] of its eight."""


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Unsigned b-bit values packed little-endian down the rows: (R, C) int32 → (32·R/b, C) int32.

    The values are one bit stream per column, so those of 3 bits may straddle two words.
    """
    start = torch.arange(packed.shape[0] * 32 // bits, device=packed.device) * bits
    word, offset = start // 32, (start % 32).int().unsqueeze(-1)
    mask = (1 << bits) - 1
    value = packed[word] >> offset
    if 32 % bits:
        above = (word + 1).clamp_max(packed.shape[0] - 1)
        left = (32 - offset).clamp(min=1, max=31)  # bits that the first word still holds
        joined = (value & ((1 << left) - 1)) | (packed[above] << left)
        value = torch.where(offset + bits > 32, joined, value)
    return value & mask


def gptq_weight(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, zero_offset: int = 1
) -> Tensor:
    """W[o,i] = scales[g,o]·(q[i,o] − z[g,o] − offset) with g = g_idx[i]   (GPTQ, arXiv:2210.17323, as files hold it).

    qweight (I·b/32, O) packs q down the rows, qzeros (G, O·b/32) packs z along them, scales (G, O), g_idx (I).
    `zero_offset` is 1 for the first format, which stores zeros less one, and 0 for the second. Returns (O, I) in the
    dtype of `scales`.
    """
    q, z = unpack_rows(qweight, bits), unpack_rows(qzeros.t().contiguous(), bits).t() + zero_offset
    group = g_idx.long()
    return (scales[group] * (q - z[group])).t()


def awq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """W[o,i] = scales[g,o]·(q[i,o] − z[g,o]) with g = i // (I/G)   (AWQ, arXiv:2306.00978, the 4-bit GEMM layout).

    qweight (I, O/8) and qzeros (G, O/8) pack eight columns a word in `AWQ_ORDER`; scales (G, O). Returns (O, I).
    """

    def unpack(packed: Tensor) -> Tensor:
        place = torch.tensor(AWQ_ORDER, device=packed.device).argsort()
        return _nibbles(packed)[..., place].flatten(1)

    size = qweight.shape[0] // scales.shape[0]
    z, s = (t.repeat_interleave(size, dim=0) for t in (unpack(qzeros), scales))
    return (s * (unpack(qweight) - z)).t()


def int8_weight(codes: Tensor, row_max: Tensor, dtype: torch.dtype) -> Tensor:
    """W[o,i] = codes[o,i]·row_max[o]/127   (LLM.int8(), arXiv:2208.07339, eq. 5): codes (O, I) int8, row_max (O)."""
    return codes.to(dtype) * (row_max / 127).to(dtype).unsqueeze(-1)


def blockwise4_weight(packed: Tensor, code: Tensor, absmax: Tensor, shape: tuple[int, int], block: int) -> Tensor:
    """w[n] = code[q[n]]·absmax[n // block] over the flattened weight   (QLoRA, arXiv:2305.14314, eq. 1–2).

    packed holds two values a byte, the first in the high half; code (16) is the NF4 or FP4 table; absmax (⌈O·I/block⌉).
    Returns (O, I) in absmax's dtype.
    """
    data = packed.reshape(-1).view(torch.uint8)
    values = code.to(absmax.dtype)[torch.stack([data >> 4, data & 15], dim=1).flatten().long()]
    count = shape[0] * shape[1]
    return (values[:count] * absmax.repeat_interleave(block)[:count]).view(shape)


def int4_tile_weight(qdata: Tensor, scale_and_zero: Tensor, shape: tuple[int, int]) -> Tensor:
    """W[o,i] = (q[o,i] − 8)·scale[g,o] + zero[g,o], as PyTorch's own 4-bit matrix product has it (CUDA only).

    qdata (O/8, I/128, 32, 4) int32 holds tiles of 8 × 128 values, scale_and_zero is (G, O, 2), both padded beyond
    `shape`. Returns (O, I).
    """
    rows, columns = qdata.shape[0] * 8, qdata.shape[1] * 128
    tiles = _nibbles(qdata).flatten(2)[..., _tile_order(qdata.device)].view(*qdata.shape[:2], 8, 128)
    q = tiles.transpose(1, 2).reshape(rows, scale_and_zero.shape[0], -1)
    scale, zero = scale_and_zero.transpose(0, 1).unsqueeze(-1).unbind(2)
    return ((q - 8) * scale + zero).view(rows, columns)[: shape[0], : shape[1]]


def _nibbles(words: Tensor) -> Tensor:
    """(…) int32 → (…, 8) int32, from the low end."""
    return (words.unsqueeze(-1) >> (4 * torch.arange(8, device=words.device, dtype=torch.int32))) & 15


@lru_cache(maxsize=8)
def _tile_order(device: torch.device) -> Tensor:
    """Where each of a tile's 8 × 128 values stands among its packed nibbles, (1024): found by packing their indices."""
    index = torch.arange(1024, device=device, dtype=torch.int32).view(8, 128)
    found = 0
    for digit in range(3):
        value = (index >> (4 * digit)) & 15
        packed = torch.ops.aten._convert_weight_to_int4pack((value[:, ::2] << 4 | value[:, 1::2]).to(torch.uint8), 8)
        found = found + (_nibbles(packed).flatten() << (4 * digit))
    return found.argsort()

"""Quantised linears of every kind for the tests, with the float weight that each stands for.

GPTQ and AWQ are stand-ins that pack and unpack value by value, as their file formats define it.
"""

from __future__ import annotations

import torch
from torch import nn

from veneer.base.quant import quantised_linear

LOADED = ("nf4", "fp4", "int8", "int8-torchao", "hqq")
STORED = ("gptq", "gptq-3-bit", "gptq-v2", "awq")
SIZES = {"nf4": (52, 96), "fp4": (38, 123), "int8": (37, 29), "int8-torchao": (37, 29), "hqq": (40, 48)}
"""(d_out, d_in); neither block nor group divides the rows of the first two."""


def make_layer(kind: str, *, dtype: torch.dtype = torch.float32, sizes: tuple[int, int] | None = None) -> nn.Module:
    """A quantised linear with bias; `sizes` (d_out, d_in) holds for those that are made by their libraries."""
    torch.manual_seed(0)
    if kind == "awq":
        return AwqTorchLinear(in_features=24, out_features=40, group_size=8, bias=True, dtype=dtype)
    if kind.startswith("gptq"):
        kind = QuantLinearV2 if kind.endswith("v2") else QuantLinear
        bits = 3 if kind == "gptq-3-bit" else 4
        return kind(bits, in_features=64, out_features=32, group_size=16, bias=True, dtype=dtype)
    d_out, d_in = sizes or SIZES[kind]
    return quantised_linear(nn.Linear(d_in, d_out), kind, dtype, "cpu")


def pack(values: list[int], bits: int) -> list[int]:
    """A little-endian bit stream of unsigned values as signed 32-bit words."""
    stream = sum(value << (bits * n) for n, value in enumerate(values))
    words = [(stream >> (32 * n)) & 0xFFFFFFFF for n in range(-(-len(values) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def packed_columns(values: torch.Tensor, bits: int) -> torch.Tensor:
    """(N, C) → (N·bits/32, C): each column is a stream of its own."""
    return torch.tensor([pack(column, bits) for column in values.t().tolist()], dtype=torch.int32).t().contiguous()


class _Packed(nn.Module):
    """y = x Wᵀ + bias with a weight that only exists as `truth`, which the packed buffers must give."""

    def __init__(self, truth, parts, bias, out_features, in_features, dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name, value in (parts | {"truth": truth}).items():
            self.register_buffer(name, value.to(dtype) if value.is_floating_point() else value)
        self.bias = nn.Parameter(torch.randn(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x):
        y = (x.unsqueeze(-2) * self.truth.to(x.dtype)).sum(-1)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class QuantLinear(_Packed):
    """GPTQ as auto-gptq writes it: zeros less one, rows in the groups that g_idx says (act-order)."""

    format = 1

    def __init__(self, bits, in_features, out_features, group_size, bias, dtype):
        groups = in_features // group_size
        q = torch.randint(0, 2**bits, (in_features, out_features))
        z = torch.randint(1, 2**bits, (groups, out_features))
        scales = torch.rand(groups, out_features) / 10 + 0.01
        g_idx = (torch.arange(in_features) // group_size)[torch.randperm(in_features)]
        scales = scales.to(dtype)
        truth = torch.stack([scales[g] * (q[i] - z[g]) for i, g in enumerate(g_idx.tolist())]).t()
        parts = {
            "qweight": packed_columns(q, bits),
            "qzeros": packed_columns((z - int(self.format == 1)).t(), bits).t().contiguous(),
            "scales": scales,
            "g_idx": g_idx.int(),
        }
        super().__init__(truth, parts, bias, out_features, in_features, dtype)
        self.bits, self.group_size = bits, group_size

    def qzero_format(self):
        return self.format


class QuantLinearV2(QuantLinear):
    """GPTQ's second format: zeros as they are."""

    format = 2


class ExllamaQuantLinear(QuantLinear):
    """A GPTQ linear whose kernel has put qweight in an order of its own."""


class AwqTorchLinear(_Packed):
    """AWQ's GEMM layout: eight neighbouring columns a word, in the order 0 2 4 6 1 3 5 7 from the low end."""

    def __init__(self, in_features, out_features, group_size, bias, dtype):
        groups = in_features // group_size
        q = torch.randint(0, 16, (in_features, out_features))
        z = torch.randint(0, 16, (groups, out_features))
        scales = (torch.rand(groups, out_features) / 10 + 0.01).to(dtype)
        truth = torch.stack([scales[i // group_size] * (q[i] - z[i // group_size]) for i in range(in_features)]).t()
        parts = {"qweight": self._packed(q), "qzeros": self._packed(z), "scales": scales}
        super().__init__(truth, parts, bias, out_features, in_features, dtype)
        self.bits, self.group_size = 4, group_size

    @staticmethod
    def _packed(values):
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        rows = [[pack([row[c + n] for n in order], 4)[0] for c in range(0, len(row), 8)] for row in values.tolist()]
        return torch.tensor(rows, dtype=torch.int32)

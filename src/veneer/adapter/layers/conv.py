"""Adapted convolutions (1-, 2- and 3-dimensional)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import math
from veneer.adapter.frozen import row_square_norms
from veneer.adapter.layers.base import AdaptedModule, clone_module
from veneer.errors import AdapterStateError

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class AdaptedConv(AdaptedModule):
    """y = base(x) + Σ_n w_n s_n B_n(A_n(dropout_n(x))): A a convolution like the base's to rank channels, B 1×…×1.

    lora_A[n] is (rank, in_channels, *kernel) and lora_B[n] (out_channels, rank/groups, 1, …), which is W's ΔW = s·B·A
    with W flattened to (out_channels, in_channels·kernel). In a grouped convolution only B is grouped, as in PEFT: A
    mixes the groups, so ΔW is no grouped kernel and cannot be merged.
    """

    kind = "conv"

    @property
    def d_in(self) -> int:
        return self.base_layer.weight[0].numel() * self.base_layer.groups

    @property
    def d_out(self) -> int:
        return self.base_layer.out_channels

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        base = self.base_layer
        ones = (1,) * len(base.kernel_size)
        return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank // base.groups, *ones)

    def supports(self, option: str) -> bool:
        return option != "dora" or self.base_layer.groups == 1

    def forward(self, x: Tensor) -> Tensor:
        if self.routing.rows is not None:
            return self._routed(x, self.routing.rows)
        y = self.base_layer(x)
        return y + sum(w * self._update(name, x, y) for name, w in self.active()) if self.active() else y

    def _update(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        xd, base = self._drop(name, x), self.base_layer
        lora_A, lora_B = (f.to(x.dtype) for f in self.factors(name))
        low = self._convolve(xd, lora_A)
        bias = self.lora_bias[name].to(x.dtype) if name in self.lora_bias else None
        update = self.scaling[name] * CONVOLVE[len(base.kernel_size)](low, lora_B, bias, groups=base.groups)
        if name not in self.lora_magnitude_vector:
            return update
        c = (self.lora_magnitude_vector[name] / self._norm(name)).to(y.dtype)
        plain = self._convolve(xd, base.weight) if self._drops(name) else y - _channels(base.bias, y)
        return (c - 1) * plain + c * update

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The base's convolution (stride, padding and its mode, dilation), ungrouped, without bias."""
        base, options = self.base_layer, {}
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        else:
            options = {"padding": base.padding}
        return CONVOLVE[len(base.kernel_size)](x, weight, None, base.stride, dilation=base.dilation, **options)

    def _routed(self, x: Tensor, rows: tuple[str | None, ...]) -> Tensor:
        if x.shape[0] != len(rows):
            raise AdapterStateError(f"routing names {len(rows)} rows but the batch has {x.shape[0]}")
        out = y = self.base_layer(x)
        for name in [n for n in dict.fromkeys(rows) if n in self.lora_A]:
            mine = torch.tensor([i for i, row in enumerate(rows) if row == name], device=x.device)
            out = out.index_add(0, mine, self._update(name, x[mine], y[mine]).to(out.dtype))
        return out

    def _norm(self, name: str) -> Tensor:
        """‖W + s B A‖ of each output channel, (1, out_channels, 1, …) float32, without gradient."""
        with torch.no_grad():
            weight = self.base_layer.weight.flatten(1)
            lora_A, lora_B = self._flat(name)
            norm = math.dora_norm(weight, row_square_norms(weight), lora_A, lora_B, self.scaling[name])
            return norm.view(1, -1, *(1,) * len(self.base_layer.kernel_size))

    def start_magnitude(self, name: str) -> Tensor:
        return self._norm(name).to(self.lora_A[name].dtype)

    def _flat(self, name: str) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = self.factors(name)
        return lora_A.flatten(1), lora_B.flatten(1)

    def delta(self, name: str) -> Tensor:
        """ΔW of one adapter in float32, shaped as the base's weight."""
        weight = self.base_layer.weight
        if self.base_layer.groups > 1:
            raise AdapterStateError("an adapter on a grouped convolution mixes the groups: its ΔW is no such kernel")
        change = math.delta(*self._flat(name), self.scaling[name])
        if name in self.lora_magnitude_vector:
            total = math.wide(weight).flatten(1) + change
            c = math.wide(self.lora_magnitude_vector[name]).view(-1, 1) / torch.linalg.vector_norm(total, dim=1).view(
                -1, 1
            )
            change = c * total - math.wide(weight).flatten(1)
        return change.view_as(weight)

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        base, mine = self.base_layer, list(self._mine(weights))
        with torch.no_grad():
            total = math.wide(base.weight) + sum(w * self.delta(n) for n, w in mine)
            bias = base.bias
            for name, w in mine:
                if name in self.lora_bias:
                    own = w * self.scaling[name] * math.wide(self.lora_bias[name])
                    bias = own if bias is None else math.wide(bias) + own
            bias = None if bias is None else bias.to(base.weight.dtype).clone()
        return clone_module(base, weight=total.to(base.weight.dtype), bias=bias)


def _channels(bias: Tensor | None, y: Tensor) -> Tensor | float:
    return 0.0 if bias is None else bias.view(1, -1, *(1,) * (y.dim() - 2))

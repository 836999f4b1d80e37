"""Adapted torch.nn.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.adapter import math
from veneer.adapter.layers.base import AdaptedModule, clone_module
from veneer.errors import AdapterStateError


class AdaptedAttention(AdaptedModule):
    """torch's attention with W_in + Σ_n w_n s_n B_n A_n as its packed input projection, and its output projection's sum.

    lora_A[n] is (rank, embed_dim), lora_B[n] (3·embed_dim, rank). The output projection is an `AdaptedLinear` in the
    base module's place `out_proj`, whose forward torch never calls: both weights are summed here and handed to torch's
    own forward, whose fused kernels want whole matrices (they are small in the models that use this module).
    """

    kind = "attention"

    @property
    def d_in(self) -> int:
        return self.base_layer.embed_dim

    @property
    def d_out(self) -> int:
        return 3 * self.base_layer.embed_dim

    @property
    def weight(self) -> Tensor:
        return self.base_layer.in_proj_weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.routing.rows is not None and any(row in self.lora_A for row in self.routing.rows):
            raise AdapterStateError("MultiheadAttention modules cannot be routed by row")
        out = self.base_layer.out_proj
        sums = {"in_proj_weight": self._sum(self, self.base_layer.in_proj_weight)}
        if isinstance(out, AdaptedModule):
            sums["out_proj.base_layer.weight"] = self._sum(out, out.weight)
        sums = {name: total for name, total in sums.items() if total is not None}
        return functional_call(self.base_layer, sums, args, kwargs) if sums else self.base_layer(*args, **kwargs)

    @staticmethod
    def _sum(layer: AdaptedModule, weight: Tensor) -> Tensor | None:
        active = layer.active()
        return weight + sum(w * layer.delta(n).to(weight.dtype) for n, w in active) if active else None

    def delta(self, name: str) -> Tensor:
        """ΔW of the packed input projection in float32, (3·embed_dim, embed_dim)."""
        return math.delta(*self.factors(name), self.scaling[name])

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        with torch.no_grad():
            weight = self.base_layer.in_proj_weight
            total = math.wide(weight) + sum(w * self.delta(n) for n, w in self._mine(weights))
            return clone_module(self.base_layer, in_proj_weight=total.to(weight.dtype))

"""Adapted layers: a frozen module and the factors of every adapter on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import math
from veneer.errors import AdapterStateError
from veneer.kernels import dispatch, reference


@dataclass
class Routing:
    """Which adapters act, shared by all layers of a bank.

    `stack` maps adapter → weight, for every row. `rows`, if set, wins: it names each batch row's own adapter, or None
    for the base alone.
    """

    stack: dict[str, float] = field(default_factory=dict)
    rows: tuple[str | None, ...] | None = None


class AdaptedLinear(nn.Module):
    """y = base(x) + Σ_n w_n s_n B_n A_n dropout_n(x) over the active adapters n (arXiv:2106.09685, eq. 3).

    lora_A[n] is (rank_n, in_features), lora_B[n] is (out_features, rank_n).
    """

    def __init__(self, base_layer: nn.Linear, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.routing = routing
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.rank: dict[str, int] = {}
        self.alpha: dict[str, float] = {}

    @classmethod
    def from_base(cls, base_layer: nn.Linear, routing: Routing) -> AdaptedLinear:
        """Wrap a linear; its parameters are not copied."""
        return cls(base_layer, routing)

    def add(
        self, name: str, lora_A: Tensor, lora_B: Tensor, *, alpha: float, rslora: bool = False, dropout: float = 0.0
    ) -> None:
        """Give the layer one more adapter: lora_A (rank, in_features), lora_B (out_features, rank)."""
        rank = lora_A.shape[0]
        if lora_A.shape != (rank, self.in_features) or lora_B.shape != (self.out_features, rank):
            raise AdapterStateError(
                f"factors {tuple(lora_A.shape)} and {tuple(lora_B.shape)} do not fit a "
                f"{self.out_features}×{self.in_features} layer"
            )
        self.lora_A[name], self.lora_B[name] = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.rank[name], self.alpha[name], self.dropout[name] = rank, alpha, dropout
        self.scaling[name] = math.scaling(rank, alpha, rslora)

    def remove(self, name: str) -> None:
        """Drop an adapter's factors."""
        del self.lora_A[name], self.lora_B[name]
        for table in (self.rank, self.alpha, self.dropout, self.scaling):
            del table[name]

    def forward(self, x: Tensor) -> Tensor:
        if self.routing.rows is not None:
            return self._routed(x, self.routing.rows)
        active = [(name, weight) for name, weight in self.routing.stack.items() if name in self.lora_A]
        if not active:
            return self.base_layer(x)
        (name, weight), *others = active
        if not others and not self._drops(name) and type(self.base_layer) is nn.Linear:
            base, s = self.base_layer, weight * self.scaling[name]
            x = x.to(base.weight.dtype)
            return dispatch.lora_linear(x, base.weight, base.bias, self.lora_A[name], self.lora_B[name], s)
        return self.base_layer(x) + self._stacked(x, active)

    def _drops(self, name: str) -> bool:
        return self.training and self.dropout[name] > 0

    def _stacked(self, x: Tensor, active: list[tuple[str, float]]) -> Tensor:
        update = 0.0
        for name, weight in active:
            xd = F.dropout(x, self.dropout[name], self.training)
            s = weight * self.scaling[name]
            update = update + reference.grouped_lora(xd, [self.lora_A[name]], [self.lora_B[name]], [s])
        return update

    def _routed(self, x: Tensor, rows: tuple[str | None, ...]) -> Tensor:
        names = [name for name in dict.fromkeys(rows) if name in self.lora_A]
        y = self.base_layer(x)
        if not names:
            return y
        if x.shape[0] != len(rows):
            raise AdapterStateError(f"routing names {len(rows)} rows but the batch has {x.shape[0]}")
        index = torch.tensor([names.index(n) if n in names else -1 for n in rows], device=x.device)
        factors = [self.lora_A[n] for n in names], [self.lora_B[n] for n in names]
        return y + reference.grouped_lora(x, *factors, [self.scaling[n] for n in names], index)

    def delta(self, name: str) -> Tensor:
        """ΔW of one adapter in float32, (out_features, in_features)."""
        return math.delta(self.lora_A[name], self.lora_B[name], self.scaling[name])

    def merged(self, weights: Mapping[str, float]) -> nn.Linear:
        """A new linear holding W + Σ w_n ΔW_n, added in float32 and rounded once; the layer is not changed."""
        total = self.base_layer.weight.float() + sum(w * self.delta(n) for n, w in weights.items() if n in self.lora_A)
        base, bias = self.base_layer, self.base_layer.bias
        out = nn.Linear(
            base.in_features, base.out_features, bias is not None, device=total.device, dtype=base.weight.dtype
        )
        with torch.no_grad():
            out.weight.copy_(total)
            if bias is not None:
                out.bias.copy_(bias)
        return out

    # Code around the layer reads these as if it were the linear itself.
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank {rank}" for name, rank in self.rank.items())

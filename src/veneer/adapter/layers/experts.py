"""Adapted parameters that are no module's own linear: the fused experts of a mixture, and routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from veneer.adapter import math
from veneer.adapter.layers.base import AdaptedModule, Routing, clone_module
from veneer.errors import AdapterStateError
from veneer.kernels import dispatch


class ParameterFactors(AdaptedModule):
    """The factors of one parameter of a module: ΔW_e = s·B_e·A_e for each expert e of a three-dimensional one.

    In PEFT's shapes: lora_A[n] is (rank·E, d_in) with expert e's rows together, lora_B[n] (d_out, rank·E) with the
    experts innermost: A_e = A.view(E, rank, d_in)[e], B_e = B.view(d_out, rank, E)[:, :, e].
    """

    kind = "parameter"

    def __init__(self, base_layer: nn.Module, routing: Routing, parameter: str) -> None:
        super().__init__(nn.Identity(), routing)
        self.__dict__["owner"] = base_layer  # not a submodule: it stands in the container
        self.parameter = parameter
        self.transposed = bool(getattr(base_layer, "is_transposed", False)) and self.value.ndim == 3

    @property
    def value(self) -> nn.Parameter:
        """The frozen parameter: (E, d_out, d_in), (E, d_in, d_out) if `transposed`, or (d_out, d_in)."""
        return getattr(self.owner, self.parameter)

    weight = value

    @property
    def experts(self) -> int:
        return self.value.shape[0] if self.value.ndim == 3 else 1

    @property
    def d_in(self) -> int:
        return self.value.shape[-2 if self.transposed else -1]

    @property
    def d_out(self) -> int:
        return self.value.shape[-1 if self.transposed else -2]

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank * self.experts, self.d_in), (self.d_out, rank * self.experts)

    def _rank_of(self, lora_A: Tensor) -> int:
        return lora_A.shape[0] // self.experts

    def by_expert(self, name: str) -> tuple[Tensor, Tensor]:
        """A as (E, rank, d_in) and B as (E, d_out, rank)."""
        lora_A, lora_B = self.factors(name)
        return (
            lora_A.view(self.experts, -1, self.d_in),
            lora_B.view(self.d_out, -1, self.experts).permute(2, 0, 1),
        )

    def delta(self, name: str) -> Tensor:
        """ΔW of one adapter in float32, shaped as the parameter."""
        lora_A, lora_B = self.by_expert(name)
        change = self.scaling[name] * torch.bmm(math.wide(lora_B), math.wide(lora_A))
        return (change.transpose(1, 2) if self.transposed else change).reshape(self.value.shape)

    def summed(self, weights: Mapping[str, float]) -> Tensor:
        """W + Σ w_n ΔW_n, added in float32 and rounded once."""
        with torch.no_grad():
            total = math.wide(self.value) + sum(w * self.delta(n) for n, w in self._mine(weights))
            return total.to(self.value.dtype)


class AdaptedParameters(AdaptedModule):
    """A module with adapters on some of its parameters, called with W + Σ_n w_n ΔW_n in their places.

    The sums are dense, which is fit for small parameters, such as a router's. Experts have a subclass without them.
    """

    kind = "container"

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__(base_layer, routing)
        self.parts = nn.ModuleDict()

    def part(self, parameter: str) -> ParameterFactors:
        """The factors of one parameter, made on first use."""
        if parameter not in self.parts:
            self.parts[parameter] = ParameterFactors(self.base_layer, self.routing, parameter)
        return self.parts[parameter]

    def acting(self) -> bool:
        """Whether any adapter acts here. `AdapterStateError` if rows are routed to one of them."""
        rows = self.routing.rows
        if rows is not None and any(row in part.lora_A for row in rows for part in self.parts.values()):
            raise AdapterStateError("adapters on fused expert parameters cannot be routed by row")
        return rows is None and any(part.active() for part in self.parts.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.acting():
            return self.base_layer(*args, **kwargs)
        sums = {}
        for name, part in self.parts.items():
            if part.active():
                change = sum(w * part.delta(n) for n, w in part.active())
                sums[name] = part.value + change.to(part.value.dtype)
        return functional_call(self.base_layer, sums, args, kwargs)

    def remove(self, name: str) -> None:
        for part in self.parts.values():
            part.remove(name)

    def rename(self, name: str, new: str) -> None:
        for part in self.parts.values():
            part.rename(name, new)

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        return clone_module(self.base_layer, **{name: part.summed(weights) for name, part in self.parts.items()})


class AdaptedExperts(AdaptedParameters):
    """Fused experts of transformers 5: y = Σ_k w_k down_e(gate(up_e(x))), e = the token's k-th expert.

    Tokens are sorted by expert and each expert's projections are x W_eᵀ + Σ_n w_n s_n (x A_eᵀ) B_eᵀ: no ΔW is formed.
    """

    kind = "experts"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is laid out as transformers' experts are."""
        marks = ("num_experts", "has_gate", "has_bias", "is_transposed", "down_proj", "_apply_gate")
        plain = all(hasattr(module, mark) for mark in marks)
        return plain and not getattr(module, "has_post_expert_norm", False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, d), top_k_index and top_k_weights (tokens, k) → (tokens, d)."""
        base, k = self.base_layer, top_k_index.shape[-1]
        if not self.acting():
            return base(hidden_states, top_k_index, top_k_weights)
        if getattr(base, "_is_expert_parallel", False):
            raise AdapterStateError("adapters on expert-parallel modules are not supported: load the model unsharded")
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        token = order // k
        counts = torch.bincount(expert, minlength=base.num_experts).tolist()
        up, act = ("gate_up_proj", base._apply_gate) if base.has_gate else ("up_proj", base.act_fn)
        parts = []
        for e, x in enumerate(hidden_states[token].split(counts)):
            if len(x):
                parts.append(self._project("down_proj", e, act(self._project(up, e, x))))
        y = torch.cat(parts) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        out = torch.empty_like(y).index_copy(0, order, y)  # back to (token, k) order: a sum without atomics
        return out.view(len(hidden_states), k, -1).sum(1).to(hidden_states.dtype)

    def _project(self, parameter: str, e: int, x: Tensor) -> Tensor:
        """Expert e's projection of x (tokens, d_in) by one parameter, with the adapters on it."""
        base = self.base_layer
        weight = getattr(base, parameter)[e]
        weight = weight.t() if base.is_transposed else weight
        bias = getattr(base, f"{parameter}_bias")[e] if base.has_bias else None
        part = self.parts[parameter] if parameter in self.parts else None
        active = part.active() if part is not None else []
        if not active:
            return F.linear(x, weight, bias)
        factors = [[f[e] for f in part.by_expert(name)] for name, _ in active]
        scales = [w * part.scaling[name] for name, w in active]
        y = dispatch.lora_linear(x, weight, bias, *factors[0], scales[0])
        for (lora_A, lora_B), s in zip(factors[1:], scales[1:]):
            y = y + s * F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))
        return y


def container_for(module: nn.Module) -> type[AdaptedParameters]:
    """The class that adapts parameters of a module."""
    return AdaptedExperts if AdaptedExperts.fits(module) else AdaptedParameters

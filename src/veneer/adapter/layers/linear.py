"""Adapted linear layers: nn.Linear, transformers' Conv1D and quantised linears."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import math, quantised
from veneer.adapter.frozen import (
    is_conv1d,
    is_quantised,
    place_of,
    plain_weight,
    row_square_norms,
    shape_of,
    weight_of,
)
from veneer.adapter.layers.base import AdaptedModule, Options, Routing, clone_module
from veneer.errors import AdapterStateError
from veneer.kernels import dispatch, reference
from veneer.kernels.quantised import Dequantise
from veneer.kernels.ranges import Ranges, Stack, Weight, stacked_lora_linear


class AdaptedLinear(AdaptedModule):
    """y = base(x) + Σ_n w_n s_n B_n A_n dropout_n(x) over the active adapters n (arXiv:2106.09685, eq. 3).

    With DoRA (arXiv:2402.09353, eq. 5) adapter n's part is w_n (c∘(W + s B A) − W) x with c = m/‖W + s B A‖ by rows.
    lora_A[n] is (rank_n, in_features), lora_B[n] is (out_features, rank_n).
    """

    kind = "linear"

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__(base_layer, routing)
        quantised.keep_layout(base_layer)
        self.packed: Any = None
        """What computes this layer in compiled code while it is packed with its neighbours; see training/packing.py."""
        self.stacked: Stack | None = None
        """The factors of all adapters that have tokens of one row, for compiled code; see training/stacking.py."""

    @property
    def d_in(self) -> int:
        return shape_of(self.base_layer)[1]

    @property
    def d_out(self) -> int:
        return shape_of(self.base_layer)[0]

    in_features, out_features = d_in, d_out

    def place(self) -> tuple[torch.device, torch.dtype]:
        return place_of(self.base_layer)

    def supports(self, option: str) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        if self.routing.ranges is not None:
            return self._ranged(x, self.routing.ranges)
        if self.routing.rows is not None:
            return self._routed(x, self.routing.rows)
        active = self.active()
        if not active:
            return self.base_layer(x)
        if len(active) == 1 and self._simple(*active[0]):
            if self.packed is not None and torch.compiler.is_compiling() and self.packed.active == active[0]:
                return self.packed(x, self.base_layer.bias, *self.factors(active[0][0]))
            if (weight := plain_weight(self.base_layer)) is not None:
                return self._fused(x.to(weight.dtype), weight, *active[0])
            if is_quantised(self.base_layer) and not self._is_dora(active[0][0]):
                if dequantise := quantised.dequantiser(self.base_layer):
                    return self._dequantised(x, dequantise, *active[0])
        y = self.base_layer(x)
        return y + sum(w * self._update(name, x, y) for name, w in active)

    def _simple(self, name: str, weight: float) -> bool:
        """Whether the fused path holds: no dropout, all tokens, and for DoRA a weight of 1."""
        return not self._drops(name) and name not in self.routing.tokens and (weight == 1.0 or not self._is_dora(name))

    def _is_dora(self, name: str) -> bool:
        return name in self.lora_magnitude_vector

    def _fused(self, x: Tensor, weight: Tensor, name: str, w: float) -> Tensor:
        (lora_A, lora_B), s = self.factors(name), w * self.scaling[name]
        if self._is_dora(name):
            m, bias = self.lora_magnitude_vector[name], self.base_layer.bias
            return dispatch.dora_linear(x, weight, bias, lora_A, lora_B, m, self.norm(name), s)
        return dispatch.lora_linear(x, weight, self._bias(name, s, x.dtype), lora_A, lora_B, s)

    def _dequantised(self, x: Tensor, dequantise: Dequantise, name: str, w: float) -> Tensor:
        (lora_A, lora_B), s = self.factors(name), w * self.scaling[name]
        return dispatch.quantised_lora_linear(x, dequantise, self._bias(name, s, x.dtype), lora_A, lora_B, s)

    def _bias(self, name: str, s: float, dtype: torch.dtype) -> Tensor | None:
        bias = self.base_layer.bias
        if name in self.lora_bias:
            own = s * self.lora_bias[name]
            bias = own if bias is None else bias + own.to(bias.dtype)
        return None if bias is None else bias.to(dtype)

    def _update(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Adapter `name`'s part of the output, given the base's output y."""
        with self.routing.streams.get(name) or nullcontext():
            xd = self._drop(name, x)
        lora_A, lora_B = self.factors(name)
        update = reference.grouped_lora(xd, [lora_A], [lora_B], [self.scaling[name]])
        if name in self.lora_bias:
            update = update + self.scaling[name] * self.lora_bias[name].to(update.dtype)
        if self._is_dora(name):
            c = (self.lora_magnitude_vector[name] / self.norm(name)).to(y.dtype)
            plain = self.base_layer(xd) if self._drops(name) else y
            bias = self.base_layer.bias
            update = (c - 1) * (plain if bias is None else plain - bias) + c * update
        return self._on_tokens(name, update)

    def _on_tokens(self, name: str, update: Tensor) -> Tensor:
        if name not in self.routing.tokens:
            return update
        acts = self.routing.tokens[name]
        if acts is None or acts.shape != update.shape[:2]:
            raise AdapterStateError(
                f"adapter {name!r} acts from its invocation tokens on (aLoRA): call the model with input_ids"
            )
        return update * acts.unsqueeze(-1)

    def _routed(self, x: Tensor, rows: tuple[str | None, ...]) -> Tensor:
        names = [name for name in dict.fromkeys(rows) if name in self.lora_A]
        y = self.base_layer(x)
        if not names:
            return y
        if x.shape[0] != len(rows):
            raise AdapterStateError(f"routing names {len(rows)} rows but the batch has {x.shape[0]}")
        if all(self._groupable(name) for name in names):
            index = torch.tensor([names.index(n) if n in names else -1 for n in rows], device=x.device)
            factors = zip(*(self.factors(n) for n in names))
            return y + dispatch.grouped_lora(x, *factors, [self.scaling[n] for n in names], index)
        out = y.clone()
        for name in names:
            mine = torch.tensor([i for i, row in enumerate(rows) if row == name], device=x.device)
            acts = self.routing.tokens.get(name)
            with _tokens_of(self.routing, name, None if acts is None else acts[mine]):
                out = out.index_add(0, mine, self._update(name, x[mine], y[mine]).to(out.dtype))
        return out

    def stack(self, ranges: Ranges) -> Stack | None:
        """The factors of the adapters that share a row, for `stacked`; None where they cannot be stacked."""
        names = [name for name in ranges.number if name in self.lora_A]
        if not names or self._own_weight() is None or not all(self._groupable(name) for name in names):
            return None
        factors, scaling = zip(*(self.factors(name) for name in names)), [self.scaling[name] for name in names]
        return Stack.of(*factors, scaling, names, ranges, self.place()[1])

    def _own_weight(self) -> Weight | None:
        """The frozen weight, or what dequantises it; None for a layer that gives neither."""
        weight: Weight | None = plain_weight(self.base_layer)
        if weight is None and is_quantised(self.base_layer):
            weight = quantised.dequantiser(self.base_layer)
        return weight

    def _ranged(self, x: Tensor, ranges: Ranges) -> Tensor:
        if self.stacked is not None and torch.compiler.is_compiling():
            self._check_tokens(x, -2)
            x = x.to(self.stacked.lora_A.dtype)
            return stacked_lora_linear(x, self._own_weight(), self._bias_in(x.dtype), self.stacked, ranges)
        names = [name for name in ranges.number if name in self.lora_A]
        if not names:
            return self.base_layer(x)
        self._check_tokens(x, -2)
        weight = self._own_weight()
        if weight is not None and all(self._groupable(name) for name in names):
            x = x.to(weight.dtype) if isinstance(weight, Tensor) else x
            factors, scaling = zip(*(self.factors(n) for n in names)), [self.scaling[n] for n in names]
            return dispatch.ranged_lora_linear(x, weight, self._bias_in(x.dtype), *factors, scaling, names, ranges)
        return self._by_range(x, self.base_layer(x), self._update, -2)

    def _bias_in(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.base_layer.bias is None else self.base_layer.bias.to(dtype)

    def _groupable(self, name: str) -> bool:
        special = self._is_dora(name) or name in self.lora_bias or name in self.routing.tokens
        return not special and not self._drops(name)

    def norm(self, name: str) -> Tensor:
        """‖W + s B A‖ of each row in float32, (d_out), without gradient (arXiv:2402.09353, section 4.3)."""
        with torch.no_grad():
            weight = weight_of(self.base_layer)
            if not torch.compiler.is_compiling():  # compiled code has frozen weights
                mark = id(self.base_layer._parameters.get("weight")), None if weight.is_inference() else weight._version
                if mark != self.__dict__.get("_squares_of"):  # a weight that is trained, or loaded anew
                    self._squares, self._squares_of = None, mark
            if self.__dict__.get("_squares") is None or self._squares.device != weight.device:
                self._squares = row_square_norms(weight)
            lora_A, lora_B = self.factors(name)
            return math.dora_norm(weight, self._squares, lora_A, lora_B, self.scaling[name])

    def start_magnitude(self, name: str) -> Tensor:
        return self.norm(name).to(self.lora_A[name].dtype)

    def delta(self, name: str) -> Tensor:
        """ΔW of one adapter in float32, (d_out, d_in)."""
        change = math.delta(*self.factors(name), self.scaling[name])
        if not self._is_dora(name):
            return change
        weight = math.wide(weight_of(self.base_layer))
        total = weight + change
        c = math.wide(self.lora_magnitude_vector[name]) / torch.linalg.vector_norm(total, dim=1)
        return c.unsqueeze(1) * total - weight

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        base, mine = self.base_layer, list(self._mine(weights))
        if is_quantised(base):
            raise AdapterStateError(
                f"merging into a quantised base ({type(base).__name__}) would round the adapter away: "
                f"merge into the original weights instead (veneer merge BASE ADAPTER --out DIR)"
            )
        with torch.no_grad():
            total = math.wide(weight_of(base)) + sum(w * self.delta(n) for n, w in mine)
            bias = base.bias
            for name, w in mine:
                if name in self.lora_bias:
                    own = w * self.scaling[name] * math.wide(self.lora_bias[name])
                    bias = own if bias is None else math.wide(bias) + own
            total = (total.t() if is_conv1d(base) else total).to(base.weight.dtype).contiguous()
            bias = None if bias is None else bias.to(base.weight.dtype).clone()
        return clone_module(base, weight=total, bias=bias)


class _tokens_of:
    """An activated adapter's positions narrowed to some rows, for the length of a block."""

    def __init__(self, routing, name: str, acts: Tensor | None) -> None:
        self.routing, self.name, self.acts = routing, name, acts

    def __enter__(self) -> None:
        self.before = self.routing.tokens.get(self.name)
        if self.acts is not None:
            self.routing.tokens[self.name] = self.acts

    def __exit__(self, *error: object) -> None:
        if self.acts is not None:
            self.routing.tokens[self.name] = self.before


__all__ = ["AdaptedLinear", "Options"]

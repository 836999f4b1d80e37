"""PEFT's LoRA layers with Veneer's forward: each class here is a PEFT class with nothing but `forward` changed.

The classes are made on first use, as `AcceleratedLinear` and so on, so that importing this module does not import PEFT;
they can be reached as attributes of this module, which is what pickle needs.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import math
from veneer.adapter.frozen import row_square_norms
from veneer.kernels import dispatch

COVERED = {
    "Linear": "layer",
    "Linear4bit": "bnb",
    "Linear8bitLt": "bnb",
    "HqqLoraLinear": "hqq",
    "TorchaoLoraLinear": "torchao",
}
"""PEFT's layer class → its module under peft.tuners.lora. Each computes base_layer(x) + s·B A dropout(x)."""


class AcceleratedForward:
    """y = base_layer(x) + s·B A dropout(x), or DoRA's, as Veneer computes it: in x's dtype, or autocast's.

    PEFT casts every input to the adapter's dtype instead, float32 as a rule. Its own forward still runs where an
    input, a state or a hook asks for more than the formula.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = _covered_adapter(self)
        if name is None or args or any(value is not None for value in kwargs.values()) or not x.is_floating_point():
            return super().forward(x, *args, **kwargs)
        base, dropout, s = self.base_layer, self.lora_dropout[name], self.scaling[name]
        lora_A, lora_B = self.lora_A[name].weight, self.lora_B[name].weight
        drops, is_dora = self.training and getattr(dropout, "p", 0) > 0, name in self.lora_variant
        if drops or not _is_plain_linear(base):
            return super().forward(x) if is_dora else _add_update(base(x), dropout(x), lora_A, lora_B, s)
        x, weight, bias = _autocast(x), _autocast(base.weight), _autocast(base.bias)
        with torch.autocast(x.device.type, enabled=False):
            if is_dora:
                magnitude, norm = self.lora_magnitude_vector[name].weight, _dora_norm(self, name)
                return dispatch.dora_linear(x, weight, bias, lora_A, lora_B, magnitude, norm, s)
            return dispatch.lora_linear(x, weight, bias, lora_A, lora_B, s)


@cache
def accelerated(kind: type) -> type | None:
    """The accelerated subclass of a PEFT layer class, or None where there is none."""
    module, name = kind.__module__, kind.__name__
    if module == f"peft.tuners.lora.{COVERED.get(name)}":
        parts = {"__module__": __name__, "__doc__": kind.__doc__, "peft_class": kind}
        return type(f"Accelerated{name}", (AcceleratedForward, kind), parts)
    return None


def __getattr__(name: str) -> type:
    kind = name.removeprefix("Accelerated")
    if kind == name or kind not in COVERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return accelerated(getattr(import_module(f"peft.tuners.lora.{COVERED[kind]}"), kind))


def _covered_adapter(layer: nn.Module) -> str | None:
    """The layer's one active adapter, if nothing but the formula, or DoRA's, is to be computed."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.lora_bias.get(names[0]) or not is_covered(layer.lora_variant.get(names[0])):
        return None
    plain = _is_plain_linear(layer.lora_A[names[0]]) and _is_plain_linear(layer.lora_B[names[0]])
    return names[0] if plain else None


def is_covered(variant: object) -> bool:
    """Whether a PEFT layer's variant of LoRA is one that is computed here."""
    return variant is None or type(variant).__name__ == "DoraLinearVariant"


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear and nothing else: no hooks, no replaced forward, no sharded or quantised weight."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    is_linear = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return is_linear and "forward" not in module.__dict__ and not any(hooks)


def _autocast(tensor: Tensor | None) -> Tensor | None:
    """What autocast would make of a linear's operand."""
    if tensor is None or tensor.dtype is torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _dora_norm(layer: nn.Module, name: str) -> Tensor:
    """‖W + s B A‖ of each row in float32, (d_out), without gradient; ‖W‖² is kept while W is the same."""
    weight = layer.base_layer.weight
    with torch.no_grad():
        mark = weight.data_ptr(), weight._version
        if layer.__dict__.get("_veneer_squares", (None,))[0] != mark:
            layer.__dict__["_veneer_squares"] = mark, row_square_norms(weight)
        squares = layer.__dict__["_veneer_squares"][1]
        return math.dora_norm(
            weight, squares, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        )


def _add_update(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, s: float) -> Tensor:
    """y[…,o] + s Σ_r (Σ_i x[…,i] A[r,i]) B[o,r] in y's dtype: x (…, I), lora_A (R, I), lora_B (O, R), y (…, O)."""
    dtype = _autocast(y).dtype
    low = (x.to(dtype) @ lora_A.to(dtype).t()).flatten(0, -2)
    flat, b = y.flatten(0, -2), lora_B.to(dtype).t()
    flat = torch.addmm(flat, low, b, alpha=s) if y.dtype == dtype else torch.add(flat, low @ b, alpha=s)
    return flat.view(y.shape)

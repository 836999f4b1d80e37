"""The frozen weight of any linear-like module, quantised or not."""

from __future__ import annotations

from torch import Tensor, nn

from veneer.adapter import quantised


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear with a quantised weight."""
    return quantised.method(module) is not None


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear-like module; None for any other."""
    if is_quantised(module):
        return quantised.shape(module)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return module.weight.shape[1], module.weight.shape[0]
    return None


def weight_of(module: nn.Module) -> Tensor:
    """The float weight (d_out, d_in) of a linear-like module: dequantised, or a view of the module's own."""
    if is_quantised(module):
        return quantised.dequantised(module)
    return module.weight if isinstance(module, nn.Linear) else module.weight.t()

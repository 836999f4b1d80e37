"""The frozen weight of a linear-like module, whatever its kind: its shape, its values, whether it is quantised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.adapter import quantised


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear that keeps its weight as (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear-like module; None for any other."""
    if is_quantised(module):
        return quantised.shape(module)
    if is_conv1d(module):
        return tuple(reversed(module.weight.shape))
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return None


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear-like module keeps its weight in another form than floating-point numbers."""
    return quantised.method(module) is not None


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear-like module as (d_out, d_in) floating-point numbers: its own, or dequantised."""
    if is_quantised(module):
        return quantised.dequantised(module)
    return module.weight.t() if is_conv1d(module) else module.weight


def plain_weight(module: nn.Module) -> Tensor | None:
    """`weight_of` where it is a view of the module's own parameter, so that kernels may use it; else None."""
    if (type(module) is nn.Linear and not is_quantised(module)) or is_conv1d(module):
        return weight_of(module)
    return None


def row_square_norms(weight: Tensor) -> Tensor:
    """‖W[o]‖² in float32 (or wider) without a float32 copy of W: weight (d_out, d_in) → (d_out)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square_()


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module's weight is, and the dtype that it computes in."""
    if is_quantised(module):
        return quantised.device(module), quantised.compute_dtype(module)
    return module.weight.device, module.weight.dtype

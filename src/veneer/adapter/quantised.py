"""Quantised linears of every library, told by their class names: the libraries are never imported for this.

Known here: bitsandbytes' Linear4bit and Linear8bitLt, torchao's tensor classes inside nn.Linear, HQQLinear, and the
GPTQ and AWQ linears of gptqmodel, auto-gptq and autoawq.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from veneer.kernels.dequantise import awq_weight, blockwise4_weight, gptq_weight, int4_tile_weight, int8_weight

AWQ_PLAIN = ("awqtorch", "awq_gemm", "awqgemm", "wqlinear_gemm")
REPACKED = ("exllama", "marlin", "machete", "bitblas", "ipex")
"""Classes and modules whose kernels shuffle `qweight` into an order of their own after loading."""


def method(module: nn.Module) -> str | None:
    """How a linear is quantised: nf4, fp4, int8, torchao, hqq, gptq or awq; None if it is no quantised linear."""
    weight = module._parameters.get("weight")
    if type(module) is nn.Linear and type(weight) is nn.Parameter:
        return None  # also what compiled code can follow; below, it cannot
    names = {kind.__name__ for kind in type(module).__mro__}
    if "Linear4bit" in names and getattr(weight, "quant_state", None) is not None:
        return weight.quant_state.quant_type
    if "Linear8bitLt" in names and weight is not None and weight.dtype == torch.int8:
        return "int8"
    if isinstance(module, nn.Linear) and type(weight).__module__.split(".")[0] == "torchao":
        return "torchao"
    if "HQQLinear" in names:
        return "hqq"
    if all(hasattr(module, part) for part in ("qweight", "scales", "in_features", "out_features")):
        return "awq" if "awq" in type(module).__name__.lower() or not hasattr(module, "g_idx") else "gptq"
    return None


def shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a quantised linear, whatever shape its packed weight has."""
    if method(module) in ("nf4", "fp4"):
        return tuple(module.weight.quant_state.shape)
    return module.out_features, module.in_features


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a quantised linear computes in; float32 for bitsandbytes' int8, which follows its input."""
    kind = method(module)
    if kind in ("nf4", "fp4"):
        return module.compute_dtype or module.weight.quant_state.dtype
    if kind == "hqq":
        return module.compute_dtype
    if kind in ("gptq", "awq"):
        return module.scales.dtype
    return torch.float32 if kind == "int8" else module.weight.dtype


def device(module: nn.Module) -> torch.device:
    """Where a quantised linear's packed weight is."""
    packed = (getattr(module, name, None) for name in ("weight", "W_q", "qweight"))
    return next(part.device for part in packed if isinstance(part, Tensor))


def dequantiser(module: nn.Module) -> Callable[[torch.dtype], Tensor] | None:
    """dtype → the weight, (d_out, d_in), made anew at each call; None for a layout known to its own kernel alone."""
    known, unpack = UNPACK[method(module)]
    return partial(unpack, module) if known(module) else None


@torch.no_grad()
def dequantised(module: nn.Module) -> Tensor:
    """The float weight of a quantised linear, (d_out, d_in), in its compute dtype.

    Where the layout is not known the module itself is asked: W is what it makes of the identity matrix.
    """
    unpack = dequantiser(module)
    return unpack(compute_dtype(module)) if unpack else _by_identity(module)


def keep_layout(module: nn.Module) -> None:
    """Stop bitsandbytes from repacking a 4-bit weight on the CPU at its first forward pass in eval mode.

    The packed form rounds the block scales to bfloat16, for good, and does not take a width that 32 does not divide.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False


def miscomputed(module: nn.Module) -> bool:
    """Whether bitsandbytes' own forward pass gets this 4-bit layer wrong, by more than a rounding."""
    from bitsandbytes import functional

    state = module.weight.quant_state
    if module.weight.is_cuda or state.shape[-1] % state.blocksize == 0:
        return False
    theirs = functional.dequantize_4bit(module.weight.data, state)
    return not torch.allclose(theirs, _bitsandbytes4(module, theirs.dtype), rtol=1e-2, atol=1e-6)


def _by_identity(module: nn.Module) -> Tensor:
    eye = torch.eye(module.in_features, dtype=compute_dtype(module), device=device(module))
    bias = getattr(module, "bias", None)
    return (module(eye) - (0 if bias is None else bias)).t()


def _bitsandbytes4(module: nn.Module, dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional

    packed, state = module.weight.data, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
    if packed.is_cuda or state.shape[-1] % state.blocksize == 0:
        return functional.dequantize_4bit(packed, state).to(dtype)
    # bitsandbytes' CPU kernel (0.50) starts a new block at each row, which its quantisation does not.
    absmax = (
        functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    )
    return blockwise4_weight(packed, state.code, absmax, tuple(state.shape), state.blocksize).to(state.dtype).to(dtype)


def _bitsandbytes8(module: nn.Module, dtype: torch.dtype) -> Tensor:
    row_max = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return int8_weight(module.weight.data, row_max, dtype)


def _torchao(module: nn.Module, dtype: torch.dtype) -> Tensor:
    weight = module.weight  # no detach: inference mode has none for it
    if hasattr(weight, "dequantize"):
        return weight.dequantize().to(dtype)
    if type(weight).__name__ == "Int4TilePackedTo4dTensor" and weight.act_pre_scale is None:
        return int4_tile_weight(weight.qdata, weight.scale_and_zero, weight.shape).to(dtype)
    return _by_identity(module).to(dtype)  # slow, but its own kernel has no gradient to x


def _hqq(module: nn.Module, dtype: torch.dtype) -> Tensor:
    return module.dequantize().detach().to(dtype)


def _gptq(module: nn.Module, dtype: torch.dtype) -> Tensor:
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().detach().t().to(dtype)
    offset = 0 if getattr(module, "qzero_format", lambda: 1)() == 2 else 1
    return gptq_weight(module.qweight, module.qzeros, module.scales, module.g_idx, module.bits, offset).to(dtype)


def _awq(module: nn.Module, dtype: torch.dtype) -> Tensor:
    return awq_weight(module.qweight, module.qzeros, module.scales).to(dtype)


def _gptq_known(module: nn.Module) -> bool:
    if hasattr(module, "dequantize_weight"):
        return True
    where = f"{type(module).__module__}.{type(module).__name__}".lower()
    bits = getattr(module, "bits", None)
    plain = bits and module.qweight.shape == (module.in_features * bits // 32, module.out_features)
    return bool(plain) and not any(word in where for word in REPACKED)


def _awq_known(module: nn.Module) -> bool:
    plain = any(word in type(module).__name__.lower() for word in AWQ_PLAIN)
    return plain and module.qweight.shape == (module.in_features, module.out_features // 8)


def _always(module: nn.Module) -> bool:
    return True


UNPACK = {
    "nf4": (_always, _bitsandbytes4),
    "fp4": (_always, _bitsandbytes4),
    "int8": (_always, _bitsandbytes8),
    "torchao": (_always, _torchao),
    "hqq": (_always, _hqq),
    "gptq": (_gptq_known, _gptq),
    "awq": (_awq_known, _awq),
}
"""Method → (is the layout of this module known, how to unpack it)."""

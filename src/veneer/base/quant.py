"""Quantised bases: which there are, how to load them, and one linear at a time."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter import quantised
from veneer.adapter.targets import output_head
from veneer.errors import BaseModelError, ConfigError

EXTRAS = {
    "nf4": "quant",
    "fp4": "quant",
    "int8": "quant",
    "int8-torchao": "torchao",
    "int4-torchao": "torchao",
    "hqq": "hqq",
}
"""What `quant=` takes → the extra of Veneer that brings the library."""
LIBRARIES = {"quant": ("bitsandbytes",), "torchao": ("torchao",), "hqq": ("hqq",), "gptq": ("gptqmodel", "optimum")}
NEEDED_BY = {"bitsandbytes": "quant", "torchao": "torchao", "hqq": "hqq", "gptq": "gptq", "awq": "gptq"}
"""`quant_method` in a model's config.json → extra."""
GROUP = 64
"""Values that share a scale in hqq and int4-torchao."""


def check_quant(quant: str | None, device: str, dtype: torch.dtype) -> str | None:
    """The method to use, None for "none". `ConfigError` (unknown, or not on this device), `BaseModelError` (library)."""
    if quant in (None, "none"):
        return None
    if quant not in EXTRAS:
        raise ConfigError(f"quant {quant!r}: use none, {', '.join(EXTRAS)}")
    if quant == "int4-torchao" and not (device.startswith("cuda") and dtype == torch.bfloat16):
        raise ConfigError("quant int4-torchao needs an NVIDIA GPU and dtype bfloat16; nf4 works everywhere")
    if device.startswith("mps") and EXTRAS[quant] == "quant":
        raise ConfigError(f"quant {quant} does not run on mps; use int8-torchao, hqq or device: cpu")
    need_extra(EXTRAS[quant], f"quant {quant}")
    return quant


def need_extra(extra: str, what: str) -> None:
    """`BaseModelError` that names the extra to install, unless its libraries are there."""
    missing = [name for name in LIBRARIES[extra] if find_spec(name) is None]
    if missing:
        raise BaseModelError(f"{what} needs {' and '.join(missing)}: pip install 'veneer[{extra}]'")
    if extra == "quant":  # it warns of a kernel that it would download, and at each 8-bit product of its rounding
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def stored_method(folder: str | Path) -> str | None:
    """How the model in a directory is already quantised, as its config.json says; None if it is not."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return str(found.get("quant_method")) if isinstance(found, dict) else None


def transformers_config(quant: str, dtype: torch.dtype) -> Any:
    """The quantization_config with which transformers loads and quantises a model, weight by weight."""
    if EXTRAS[quant] == "torchao":
        from transformers import TorchAoConfig

        return TorchAoConfig(_torchao_config(quant))
    from transformers import BitsAndBytesConfig

    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quantise(model: nn.Module, quant: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Replace every linear but the output head by a quantised one on `device`, in place; returns the model.

    What transformers does while it loads, for the cases where it cannot: HQQ and GGUF files.
    """
    head = output_head(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, quantised_linear(child, quant, dtype, device))
    return model


def quantised_linear(linear: nn.Linear, quant: str, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    """A linear's quantised twin on `device`; the linear is not changed. `BaseModelError` if its size does not allow it."""
    weight, bias = linear.weight.detach().to(dtype), linear.bias
    d_out, d_in = weight.shape
    if EXTRAS[quant] == "torchao":
        from torchao.quantization import quantize_

        made = _plain(weight, bias).to(device)
        quantize_(made, _torchao_config(quant))
    elif quant == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        if weight.numel() % GROUP:
            raise BaseModelError(f"quant hqq: a {d_out}×{d_in} weight does not divide into groups of {GROUP}; use nf4")
        config = BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
        made = HQQLinear(_plain(weight, bias), config, compute_dtype=dtype, device=str(device))
    else:
        import bitsandbytes.nn as bnb

        if quant == "int8":
            made = bnb.Linear8bitLt(d_in, d_out, bias is not None, has_fp16_weights=False, threshold=6.0)
            made.weight = bnb.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.Linear4bit(d_in, d_out, bias is not None, dtype, compress_statistics=True, quant_type=quant)
            made.weight = bnb.Params4bit(weight.cpu(), requires_grad=False, quant_type=quant, module=made)
        made.bias = _plain(weight, bias).bias
        made = made.to(device)
        quantised.keep_layout(made)
    return made.requires_grad_(False)


def unmap(model: nn.Module) -> None:
    """Copy what stayed float: one tensor of a memory-mapped weights file in use keeps all of its pages resident."""
    for module in model.modules():
        if not quantised.method(module):
            for parameter in module.parameters(recurse=False):
                if parameter.device.type == "cpu":
                    parameter.data = parameter.data.clone()


def steady(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in eval mode.

    `BaseModelError` where its CPU kernel would compute with other weights than it has stored.
    """
    for name, module in model.named_modules():
        quantised.keep_layout(module)
        kind = quantised.method(module)
        if kind in ("nf4", "fp4") and quantised.miscomputed(module):
            raise BaseModelError(
                f"{name} has {module.in_features} inputs, which blocks of {module.weight.quant_state.blocksize} do not "
                f"divide: bitsandbytes computes such a layer wrongly on a CPU; use int8 or int8-torchao, or a GPU"
            )


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A frozen linear that holds these very values."""
    made = nn.Linear(1, 1, bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    return made


def _torchao_config(quant: str) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if quant == "int8-torchao":
        return Int8WeightOnlyConfig()
    return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")

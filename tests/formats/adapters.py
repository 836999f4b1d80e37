"""Adapters with random factors, on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import veneer


def put(model: nn.Module, name: str, seed: int, **options) -> nn.Module:
    """Attach an adapter whose trained values are all random."""
    options = {"rank": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj"]} | options
    bank = veneer.attach(model, veneer.AdapterConfig(**options), name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters(name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return model


def saved(path: Path, model: nn.Module, seed: int = 0, **options) -> Path:
    """A directory with such an adapter for `model`, which is left with it."""
    veneer.save_adapter(put(model, "default", seed, **options), path)
    return path


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rank": 3}


def moe() -> nn.Module:
    """A Mixtral with five fused experts in each of two blocks."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()

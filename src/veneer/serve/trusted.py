"""Which runner a machine is trusted with: kernels are tried before they serve."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch

from veneer.kernels.served_check import Shapes, sound, sound_blocks
from veneer.serve.block import known
from veneer.serve.registry import Registry
from veneer.serve.runner import Runner, head_sizes


def runner_for(registry: Registry) -> type[Runner]:
    """Captured graphs where there is a GPU whose triton kernels compute what they should, plain torch elsewhere."""
    if registry.device.type != "cuda" or find_spec("triton") is None:
        return Runner
    from veneer.serve.graphs import GraphRunner, OwnBlocks

    shapes, cache = shapes_of(registry), registry.model.get_input_embeddings().weight.dtype
    if not sound(registry.device, registry.dtype, shapes, cache):
        warnings.warn("the serving kernels are wrong on this GPU: plain torch serves, slower", stacklevel=3)
        return Runner
    if shapes.block and not sound_blocks(registry.device, cache, shapes):
        warnings.warn("the kernels of whole blocks are wrong on this GPU: the model's own serve, slower", stacklevel=3)
        return OwnBlocks
    return GraphRunner


def shapes_of(registry: Registry) -> Shapes:
    """The model's own: its heads and blocks, and its widest inputs with the narrowest linears that read them."""
    outs: dict[int, set[int]] = {}
    for d_out, d_in in registry.targets.values():
        outs.setdefault(d_in, set()).add(d_out)
    linears = tuple((d_in, tuple(sorted(outs[d_in])[:3])) for d_in in sorted(outs)[-3:])
    config = registry.model.config.get_text_config()
    queries, keys, width = head_sizes(config)
    block = None
    if known(registry.model):
        normed = hasattr(registry.model.base_model.layers[0].self_attn, "q_norm")
        block = config.hidden_size, config.intermediate_size, normed
    return Shapes(linears, (min(keys, 2), queries // keys, width), block=block)


def on(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the thread's own, which triton and captures go by; nothing elsewhere."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

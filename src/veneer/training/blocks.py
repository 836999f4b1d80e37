"""A model's repeated blocks: found by structure, compiled once for all of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from veneer.adapter.layers import AdaptedModule
from veneer.kernels.compiling import compile_or_plain


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats, in order: the items of its module lists of one class that hold adapted layers.

    A list inside a block (experts, say) is part of that block.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if len({type(block) for block in module}) > 1:
            continue
        if not any(isinstance(part, AdaptedModule) for block in module for part in block.modules()):
            continue
        found += list(module)
        inside |= {id(part) for block in module for part in block.modules()}
    return found


def compile_blocks(blocks: list[nn.Module], *, dynamic: bool | None, note: Callable[[str], None]) -> None:
    """torch.compile on each block instance; the code is compiled once and shared, as parameters are its inputs."""
    for block in blocks:
        block.forward = compile_or_plain(block.forward, dynamic=dynamic, note=note)

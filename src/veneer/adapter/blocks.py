"""A model's repeated blocks, found by structure, and which of them are treated otherwise than the rest."""

from __future__ import annotations

from torch import nn

from veneer.adapter.layers import AdaptedModule
from veneer.errors import ConfigError


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


def spread(dial: str, blocks: int, keep: int = 0, *, compiled: bool = True) -> list[str]:
    """A mode of `veneer.training.store` for each block; the last `keep` blocks are selective on any saving setting.

    What the last blocks keep is wanted first, so it is they that stay. Where the compiler does not choose what a block
    keeps, "mixed" is two of seven blocks as offload and the others as recompute-offload.
    """
    modes = [dial] * blocks
    if dial == "mixed" and not compiled:
        modes = ["offload" if i % 7 in (1, 4) else "recompute-offload" for i in range(blocks)]
    if keep and dial not in ("keep", "selective"):
        modes[-keep:] = ["selective"] * min(keep, blocks)
    return modes


def staying(blocks: int, resident: int) -> frozenset[int]:
    """Which of a streamed base's blocks stay on the device, `resident` of them spread evenly: then the copies of the others
    have all blocks' computation to hide behind. `ConfigError` for more than there are."""
    if resident > blocks:
        raise ConfigError(f"train.resident_blocks: {resident} is more than the model's {blocks} blocks")
    return frozenset(i for i in range(blocks) if (i + 1) * resident // blocks > i * resident // blocks)

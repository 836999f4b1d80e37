"""What an adapter trains, in numbers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import nn

from veneer.adapter.frozen import is_quantised, shape_of

if TYPE_CHECKING:
    from veneer.adapter.bank import Bank


@dataclass(frozen=True)
class AttachReport:
    """What an adapter trains, in numbers. `bytes` is its size on disk, without the file's header."""

    trainable_parameters: int
    total_parameters: int
    bytes: int
    modules: int
    targets: tuple[dict, ...]

    @property
    def share(self) -> float:
        """Trained share of all parameters, 0 to 1."""
        return self.trainable_parameters / self.total_parameters

    def __str__(self) -> str:
        return (
            f"training {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({self.share:.2%}) "
            f"in {self.modules} modules; adapter {self.bytes / 2**20:.1f} MiB on disk"
        )


def count(bank: Bank, name: str) -> AttachReport:
    """Count what adapter `name` trains."""
    trained = bank.parameters(name)
    mine = {id(p) for p in trained.values()}
    with bank.disabled():
        total = _base_size(bank.model, mine)
    groups: dict[tuple, list[str]] = defaultdict(list)
    for path in bank.entries[name].targets:
        layer = bank.layers[path]
        own = sum(p.numel() for p in layer.trained(name).values() if p.requires_grad)
        groups[path.rsplit(".", 1)[-1], layer.rank[name], layer.d_out, layer.d_in, own].append(path)
    targets = tuple(
        {
            "name": leaf,
            "modules": len(paths),
            "rank": rank,
            "d_out": d_out,
            "d_in": d_in,
            "parameters": len(paths) * own,
        }
        for (leaf, rank, d_out, d_in, own), paths in groups.items()
    )
    count = sum(p.numel() for p in trained.values() if p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in trained.values())
    total += sum(p.numel() for p in trained.values())
    return AttachReport(count, total, size, len(bank.entries[name].targets), targets)


def _base_size(model: nn.Module, trained: set[int]) -> int:
    """Parameters of the base; a quantised weight counts as what it stands for, not as its packed words."""
    linears = [module for module in model.modules() if is_quantised(module)]
    packed = {id(p) for module in linears for name, p in module._parameters.items() if name != "bias"}
    own = [p for name, p in model.named_parameters() if ".lora_" not in name and id(p) not in trained | packed]
    return sum(p.numel() for p in own) + sum(prod(shape_of(module)) for module in linears)

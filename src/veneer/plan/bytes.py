"""What things weigh: pure arithmetic over counts of numbers. All results are bytes; a GB is 10⁹ of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, prod

NF4_BLOCK, NF4_BLOCKS = 64, 256
"""Numbers that share a scale, and scales that share a scale of their own (QLoRA, arXiv:2305.14314, section 3)."""
BFLOAT16, FLOAT32 = 2, 4
MOMENTS = 2
"""AdamW keeps two running means for each number that it trains (arXiv:1711.05101)."""

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of a number by dtype, in the order in which a safetensors file holds them."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one way of training holds all the time. Activations, which depend on the batch, are not in it."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def as_dict(self) -> dict[str, int]:
        return {key: round(value) for key, value in (asdict(self) | {"total": self.total}).items()}


def nf4(numbers: int) -> float:
    """A weight of so many numbers in NF4 with double quantisation: 4 bits each, an 8-bit scale for every 64 of them and
    a float32 scale for every 256 of those: 0.516 bytes a number."""
    blocks = ceil(numbers / NF4_BLOCK)
    return ceil(numbers / 2) + blocks + FLOAT32 * ceil(blocks / NF4_BLOCKS)


def gradients(numbers: int, each: int = FLOAT32) -> int:
    """One number for each that is trained: 28 GB for 7 billion in float32."""
    return numbers * each


def full(numbers: int) -> Memory:
    """Full fine-tuning with AdamW in float32: 16 bytes a number.

    Mixed precision holds as much: bfloat16 weights and gradients, and the optimiser's float32 copy of the weights
    (ZeRO, arXiv:1910.02054, section 3.1).
    """
    return Memory(FLOAT32 * numbers, gradients(numbers), MOMENTS * FLOAT32 * numbers)


def adapter_only(base: float, adapter: int, trained: int) -> Memory:
    """LoRA or QLoRA on a frozen base, all in bytes: of the base, of what the adapter holds, and of what is trained in it
    (in the dtype it is trained in, which gradients and moments share)."""
    return Memory(base + adapter, trained, MOMENTS * trained)


def safetensors_size(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    """The size of the file that holds these tensors, name → (dtype as the format names it, shape): header included."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, order = 0, list(SIZES)
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        end = offset + SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + ceil(length / 8) * 8 + offset

"""Cards that people own, for machines that are not this one: memory and rates as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.plan.roofline import Rates

GIB = 1 << 30
USABLE = 0.98
"""Of a card's memory; the driver keeps the rest."""
SUSTAINED = 0.65
"""Of the stated FLOP/s in a large product kept up (644 of 989 TFLOP/s on an H200, benchmarks/results/gpu_train.json)."""
REACHED = 0.85
"""Of the stated bandwidth in a large copy."""
CALL, DISK = 6e-6, 2e9
"""Seconds to start an operation; bytes a second from a common NVMe disk, read through the file system."""


@dataclass(frozen=True)
class Card:
    """A GPU. `memory` in bytes, `products` dense bfloat16 (float16 on a T4) FLOP/s summed in float32, `bandwidth` and
    `link` (from the host, one way) bytes a second; all as stated."""

    name: str
    memory: int
    products: float
    bandwidth: float
    link: float

    @property
    def usable(self) -> int:
        return int(self.memory * USABLE)

    @property
    def rates(self) -> Rates:
        return Rates(self.products * SUSTAINED, self.bandwidth * REACHED, self.link * REACHED, DISK, CALL)


def _card(name: str, gib: int, tflops: float, gigabytes: float, link: float) -> Card:
    return Card(name, gib * GIB, tflops * 1e12, gigabytes * 1e9, link * 1e9)


CARDS = [
    _card("RTX 4060", 8, 30, 272, 16),
    _card("RTX 3060", 12, 25.6, 360, 32),
    _card("RTX 4070", 12, 58, 504, 32),
    _card("RTX 5070", 12, 62, 672, 64),
    _card("T4", 16, 65, 320, 16),
    _card("RTX 4060 Ti 16GB", 16, 44, 288, 16),
    _card("RTX 5060 Ti 16GB", 16, 47, 448, 32),
    _card("RTX 4080", 16, 97.5, 717, 32),
    _card("RTX 3090", 24, 71, 936, 32),
    _card("RTX 4090", 24, 165, 1008, 32),
    _card("L4", 24, 121, 300, 32),
    _card("A10", 24, 125, 600, 32),
    _card("RTX 5090", 32, 209.5, 1792, 64),
    _card("A100 40GB", 40, 312, 1555, 32),
    _card("L40S", 48, 362, 864, 32),
    _card("A100 80GB", 80, 312, 2039, 32),
    _card("H100", 80, 989, 3350, 64),
    _card("H200", 141, 989, 4800, 64),
]
"""In order of memory."""
CPU = Rates(products=100e9, bandwidth=20e9, copy=10e9, disk=1e9, call=4e-6, queued=False)
"""Two ordinary cores in float32, until `veneer bench --calibrate` has measured."""


def card_for(memory: float) -> Card:
    """The first card with so much memory; the largest if none has."""
    return next((card for card in CARDS if card.memory >= memory * 0.95), CARDS[-1])

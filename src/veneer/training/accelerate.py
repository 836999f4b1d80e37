"""What makes a training step fast on a GPU, put on a model and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from veneer.training.blocks import compile_blocks, repeated_blocks
from veneer.training.store import Mode, Store

Dial = Literal["keep", "recompute", "recompute-offload", "offload", "mixed"]
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def spread(dial: Dial, blocks: int) -> list[Mode]:
    """A mode for each block. "mixed": every third block sends what it saves to the host, the others are recomputed."""
    if dial == "mixed":
        return ["offload" if i % 3 == 1 else "recompute-offload" for i in range(blocks)]
    return [dial] * blocks


class Accelerated:
    """A context in which a model's repeated blocks are compiled, and keep what they save as the dial says.

    `modes` is one word of the dial or one mode for each block; `packed` says that rows differ in length.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        modes: Dial | Sequence[Mode] = "keep",
        compile: bool = True,
        packed: bool = True,
        random: bool = False,
        note: Callable[[str], None] = print,
    ) -> None:
        self.model, self.blocks = model, repeated_blocks(model)
        self.compile, self.packed, self.note = compile, packed, note
        self.modes = spread(modes, len(self.blocks)) if isinstance(modes, str) else list(modes)
        self.device = next(model.parameters()).device
        self.store = Store(self.blocks, model.parameters(), self.device, random=random)
        self._stack = ExitStack()

    def __enter__(self) -> Accelerated:
        if self.compile:
            compile_blocks(self.blocks, dynamic=self.packed, note=self.note)
        self.store.wrap(self.modes)
        if self.device.type == "cuda":
            hopper = torch.cuda.get_device_capability(self.device) >= (9, 0)
            order = BACKENDS if hopper else BACKENDS[1:]
            self._stack.enter_context(sdpa_kernel(order, set_priority=True))
        return self

    def __exit__(self, *error: object) -> None:
        for block in self.blocks:
            block.__dict__.pop("forward", None)
        self._stack.close()

    def start(self) -> None:
        """Call before each forward pass of a training step."""
        self.store.start()

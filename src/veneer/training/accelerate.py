"""What makes a training step fast, put on a model and taken off again: compiled blocks, and a dial for their memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from torch.random import fork_rng

from veneer.adapter.blocks import repeated_blocks, spread
from veneer.errors import ConfigError
from veneer.kernels.compiling import compile_or_plain
from veneer.kernels.devices import indexed
from veneer.training.chunks import Chunked
from veneer.training.packing import Packing, watch
from veneer.training.stacking import stacking
from veneer.training.store import SENT, Mode, Store, recomputing

KEEP: dict[Mode, float] = {
    "keep": 1.0, "selective": 0.9, "offload": 0.9, "mixed": 0.38, "recompute": 0.0, "recompute-offload": 0.0
}  # fmt: skip
"""The share that the compiler keeps on each setting. In a Llama's or Qwen's block products and attention are up to 0.88 of
what could be kept, the rest normalised inputs: with less for selective, attention would be computed again. What mixed
keeps of an 8B block takes as long over PCIe 5 as the block's forward pass takes on a Hopper GPU."""
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def use_compile(wish: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Whether blocks are compiled: auto does so on a GPU that has triton. Raises `ConfigError`."""
    there = device.type == "cuda" and find_spec("triton") is not None
    if wish == "on" and device.type == "cuda" and not there:
        raise ConfigError("train.compile: on needs triton: pip install triton, or use auto")
    return wish == "on" or (wish == "auto" and there)


def draws_random(model: nn.Module) -> bool:
    """Whether a model in training draws random numbers: by dropout of its own or of an adapter."""
    config = getattr(model, "config", None)
    rates = [module.p for module in model.modules() if isinstance(module, _DropoutNd)]
    rates += [value for key, value in (vars(config) if config is not None else {}).items() if "drop" in key]
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


class Accelerated:
    """A context in which a model's repeated blocks are compiled and keep what the dial says for the backward pass.

    `modes` is one word of the dial (with `keep` as in `spread`), or a mode for each block. `dynamic` says that inputs
    differ in length, `device` where it computes (absent: where its first parameter is), `packs` whether linears of one
    input may be packed, `lean` is `compiling.backend`'s. Rows of more than `long` tokens (0: none) have their MLPs in
    chunks, in blocks that recompute. Each block instance gets another `forward` while the context lasts; no class is
    changed. On Hopper GPUs attention prefers cuDNN's kernels.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        modes: Mode | Sequence[Mode] = "keep",
        keep: int = 0,
        compile: bool = True,
        dynamic: bool = True,
        note: Callable[[str], None] = print,
        device: torch.device | None = None,
        packs: bool = True,
        lean: bool = False,
        long: int = 0,
    ) -> None:
        self.blocks = repeated_blocks(model)
        self.modes = list(modes)
        if isinstance(modes, str):
            self.modes = spread(modes, len(self.blocks), keep, compiled=compile)
        self.compile, self.dynamic, self.note = compile, dynamic, note
        self.device, self.random = indexed(device or next(model.parameters()).device), draws_random(model)
        self.model, self.packing, self.packs, self.lean = model, Packing(), packs, lean
        self.long, self.chunked = long, Chunked(self.random, note)
        self.store = Store(model.parameters(), self.device)
        self._stack = ExitStack()

    def __enter__(self) -> Accelerated:
        for block, mode in zip(self.blocks, self.modes, strict=True):
            block.forward = self._wrapped(block, block.forward, mode)
        if self.compile and self.packs and self.blocks:
            self.blocks[0].forward = self._packing_first(self.blocks[0].forward)
        if self.device.type == "cuda":
            hopper = torch.cuda.get_device_capability(self.device) >= (9, 0)
            self._stack.enter_context(sdpa_kernel(BACKENDS if hopper else BACKENDS[1:], set_priority=True))
        return self

    def _wrapped(self, block: nn.Module, forward: Callable, mode: Mode) -> Callable:
        call = recomputing(forward, self.random) if KEEP[mode] == 0 else forward
        if self.compile:
            lean = self.lean or mode == "recompute-offload"  # it is there to save memory
            options = {"keep": KEEP[mode], "lean": lean, "dynamic": self.dynamic, "note": self.note}
            call = compile_or_plain(forward, otherwise=call, **options)
        if self.long and KEEP[mode] == 0:
            call = self._by_length(call, recomputing(self.chunked.block(block, forward), self.random))
        call = self.store.offloading(call) if mode in SENT else call
        return stacking(block, call) if self.compile else call

    def _by_length(self, short: Callable, long: Callable) -> Callable:
        """`long` for rows of more than `self.long` tokens; it is not compiled: launching kernels is not what takes time."""

        @wraps(short)
        def call(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (long if hidden.shape[-2] > self.long else short)(hidden, *args, **kwargs)

        return call

    def _packing_first(self, forward: Callable) -> Callable:
        """The first block's forward, which at its first call packs all blocks' linears that have one input."""
        block, own = self.blocks[0], type(self.blocks[0]).forward

        @wraps(forward)
        def fresh(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():  # an evaluation, which nobody has announced by `start`
                self.packing.refresh()
            return forward(*args, **kwargs)

        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            block.forward = fresh
            with torch.no_grad(), fork_rng([self.device] if self.device.type == "cuda" else []), watch(block) as groups:
                own(block, *args, **kwargs)
            self.packing.pack([b for b in self.blocks if type(b) is type(block)], groups)
            self.packing.refresh()
            self.store.keep_out([*self.model.parameters(), *self.packing.tensors()])
            return forward(*args, **kwargs)

        return call

    def __exit__(self, *error: object) -> None:
        self.store.start()
        self.packing.unpack()
        for block in self.blocks:
            block.__dict__.pop("forward", None)
        self._stack.close()

    def start(self, *, unchanged: bool = False) -> None:
        """Call before each forward pass of a training step; `unchanged`: no factor has changed since the last call."""
        self.store.start()
        if not unchanged:
            self.packing.refresh()

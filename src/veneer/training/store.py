"""Where a block keeps what its backward pass needs: on the device, nowhere (it is computed again), or in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from veneer.kernels.devices import indexed

Mode = Literal["keep", "selective", "recompute", "recompute-offload", "offload", "mixed"]
"""What a block keeps. keep: all that saves work. selective: what is dear to compute again (products, attention).
recompute: its input alone. recompute-offload: its input, in host memory. offload: what selective keeps, in host memory,
sent while later blocks compute and brought back ahead of its use. mixed: as much of that as is sent in the time that the
block computes; the rest is computed again."""
SENT: tuple[Mode, ...] = ("recompute-offload", "offload", "mixed")
"""The modes that send to the host."""

SMALL = 1 << 20
"""Bytes below which moving a tensor costs more than it frees."""


class Parcel:
    """A tensor that was moved to pinned host memory."""

    def __init__(self, tensor: Tensor, host: Tensor) -> None:
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.host = host
        self.source: Tensor | None = tensor
        """The tensor on the device, until its copy is done."""
        self.back: Tensor | None = None
        self.event: torch.cuda.Event | None = None
        """The end of the last copy, to the host or back."""


class Host:
    """Pinned buffers and a stream of their own for copies to and from the host, beside the computation.

    All device memory is allocated and freed on the computing stream, which waits for a copy before it lets go of the
    copied tensor: so the allocator can use that memory again at once, and no more than `AHEAD` blocks' tensors are
    under way. The copies run on one stream in order, so a buffer may be filled again once its last read was issued.
    """

    AHEAD = 2

    def __init__(self, device: torch.device) -> None:
        self.device = indexed(device)
        self.stream = torch.cuda.Stream(self.device) if device.type == "cuda" else None
        self.free: dict[int, list[Tensor]] = {}
        self.groups: list[list[Parcel]] = []
        """The parcels of each block of this forward pass, in order; taken from the end in the backward pass."""

    def open_group(self) -> list[Parcel]:
        """The next block's parcels; lets go of what blocks `AHEAD` of it left on the device."""
        if len(self.groups) >= self.AHEAD:  # those before were let go of in their turn
            self.let_go(self.groups[-self.AHEAD])
        self.groups.append([])
        return self.groups[-1]

    def let_go(self, group: list[Parcel]) -> None:
        """Free the device memory of tensors that were sent, after their copies."""
        for parcel in group:
            if parcel.source is not None:
                self.wait(parcel)
            parcel.source = None

    def put(self, tensor: Tensor) -> Parcel:
        """Start moving a tensor (dense, any strides) to the host."""
        size = tensor.numel() * tensor.element_size()
        spare = self.free.get(size)
        host = spare.pop() if spare else torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        parcel = Parcel(tensor, host)
        flat = torch.as_strided(tensor, (tensor.numel(),), (1,)).view(torch.uint8)
        parcel.event = self._copy(host, flat)
        return parcel

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def fetch(self, parcel: Parcel) -> None:
        """Start moving a parcel back, unless it is on the device still."""
        if parcel.back is None and parcel.source is None:
            parcel.back = torch.empty_like(parcel.host, device=self.device, pin_memory=False)
            parcel.event = self._copy(parcel.back, parcel.host)
            self.free.setdefault(parcel.host.numel(), []).append(parcel.host)

    def take(self, parcel: Parcel, group: list[Parcel]) -> Tensor:
        """The tensor of a parcel; the rest of its group and the group before it are fetched ahead."""
        at = next((i for i in reversed(range(len(self.groups))) if self.groups[i] is group), None)
        if at is not None:
            for early in (*group, *(self.groups[at - 1] if at else ())):
                self.fetch(early)
            del self.groups[at:]
        self.fetch(parcel)
        if parcel.source is not None:  # it never left; what the copy under way reads from now on is of no use to anyone
            back, parcel.source = parcel.source, None
            self.free.setdefault(parcel.host.numel(), []).append(parcel.host)
            return back
        back, parcel.back = parcel.back, None
        self.wait(parcel)
        return back.view(parcel.dtype).as_strided(parcel.shape, parcel.stride)

    def wait(self, parcel: Parcel) -> None:
        """Let the computing stream wait for a parcel's last copy."""
        if parcel.event is not None:
            torch.cuda.current_stream(self.device).wait_event(parcel.event)


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its storage from its first element on without gaps, in whatever order."""
    sizes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)
    wanted = 1
    for stride, size in sizes:
        if stride != wanted:
            return False
        wanted *= size
    return True


def _storages(tensor: Tensor) -> list[int]:
    """Addresses of a tensor's storage, or of those inside a tensor that is made of others (torchao's)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.untyped_storage().data_ptr()]
    names, _ = tensor.__tensor_flatten__()
    return [at for name in names for at in _storages(getattr(tensor, name))]


class Store:
    """Sends what blocks save to the host and brings it back. `frozen` are tensors that stay on the device anyway."""

    def __init__(self, frozen: Iterable[Tensor], device: torch.device) -> None:
        self.host = Host(device)
        self.keep_out(frozen)

    def keep_out(self, frozen: Iterable[Tensor]) -> None:
        """Never send these tensors."""
        self.frozen = {at for tensor in frozen for at in _storages(tensor)}

    def offloading(self, forward: Callable) -> Callable:
        """`forward` with what it saves for the backward pass in host memory."""

        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            shared = {t.data_ptr() for t in (*args[1:], *kwargs.values(), *_inside(kwargs)) if isinstance(t, Tensor)}
            group = self.host.open_group()
            with saved_tensors_hooks(lambda t: self._pack(t, group, shared), lambda kept: self._unpack(kept, group)):
                return forward(*args, **kwargs)

        return call

    def _pack(self, tensor: Tensor, group: list[Parcel], shared: set[int]) -> Tensor | Parcel:
        size = tensor.numel() * tensor.element_size()
        known = tensor.untyped_storage().data_ptr() in self.frozen or tensor.data_ptr() in shared
        if size < SMALL or known or tensor.device != self.host.device or not _dense(tensor):
            return tensor
        parcel = self.host.put(tensor.detach())
        group.append(parcel)
        return parcel

    def _unpack(self, kept: Tensor | Parcel, group: list[Parcel]) -> Tensor:
        return self.host.take(kept, group) if isinstance(kept, Parcel) else kept

    def start(self) -> None:
        """Forget what a forward pass without a backward one left; call it before each forward pass."""
        for group in self.host.groups:
            for parcel in group:
                self.host.free.setdefault(parcel.host.numel(), []).append(parcel.host)
        self.host.groups.clear()


def recomputing(forward: Callable, random: bool) -> Callable:
    """`forward` that keeps its inputs alone and runs again in the backward pass; `random` if it draws random numbers."""

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)

    return call


def _inside(kwargs: dict[str, Any]) -> list[Tensor]:
    return [t for value in kwargs.values() if isinstance(value, tuple) for t in value if isinstance(t, Tensor)]

"""Frozen tensors of a block as bytes laid out one after the other, in host memory or in files, and where modules see them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from veneer.errors import BaseModelError

ALIGN = 256
"""Bytes that the start of each tensor in a buffer is a multiple of, as the allocator's own are."""
Spot = tuple[int, tuple[int, int] | None]
"""Where a tensor lies in a buffer: its first byte, and its strides unless it is contiguous."""


@dataclass(frozen=True)
class Place:
    """Where a module keeps a frozen tensor: a parameter's `data`, a buffer, or a part of a quantisation state."""

    owner: Any
    name: str

    def get(self) -> Tensor:
        """The tensor that is there now."""
        return getattr(self.owner, self.name)

    def put(self, tensor: Tensor) -> None:
        """Let the module see another tensor."""
        setattr(self.owner, self.name, tensor)


def places(module: nn.Module) -> list[Place]:
    """All places of a module's frozen tensors, in a fixed order; bitsandbytes' states included."""
    found = []
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                found.append(Place(parameter, "data"))
                found += _of_state(getattr(parameter, "quant_state", None))
        found += [Place(part, name) for name, buffer in part._buffers.items() if buffer is not None]
        state = getattr(part, "state", None)
        if type(state).__name__ == "MatmulLtState" and getattr(part.weight, "CB", None) is not None:
            part.init_8bit_state()  # as its first forward pass would: the codes and row maxima move to `state`
        found += [Place(state, name) for name in ("CB", "SCB") if torch.is_tensor(getattr(state, name, None))]
    return found


def _of_state(state: Any) -> list[Place]:
    if state is None:
        return []
    own = [Place(state, name) for name in ("absmax", "code", "offset") if torch.is_tensor(getattr(state, name, None))]
    return own + _of_state(getattr(state, "state2", None))


@dataclass
class Leaf:
    """One frozen tensor of a block: all places that hold it, and where it stands in the block's bytes.

    `home` is the tensor on the host. On the device it has `dtype`. `file` is (descriptor, start) of its bytes on disk.
    """

    places: list[Place]
    home: Tensor
    dtype: torch.dtype
    offset: int = 0
    cast_offset: int = 0
    file: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.home.numel() * self.home.element_size()


@dataclass
class Block:
    """A block's frozen tensors, laid out one after the other. `flat` has their bytes; None: they are read from files."""

    leaves: list[Leaf]
    flat: Tensor | None = None
    views: dict[int, list[Tensor]] = field(default_factory=dict)
    nbytes: int = 0
    cast_bytes: int = 0

    def __post_init__(self) -> None:
        for leaf in self.leaves:
            leaf.offset = self.nbytes
            self.nbytes += _aligned(leaf.nbytes)
            if leaf.dtype != leaf.home.dtype:
                leaf.cast_offset = self.cast_bytes
                self.cast_bytes += _aligned(leaf.home.numel() * leaf.dtype.itemsize)

    def put_home(self) -> None:
        """Let the modules see the host's tensors."""
        for leaf in self.leaves:
            for place in leaf.places:
                place.put(leaf.home)

    def read(self, target: Tensor) -> None:
        """Read the bytes from their files into a flat buffer in host memory; no page is mapped for it."""
        buffer = memoryview(target.numpy())
        for leaf in self.leaves:
            descriptor, start = leaf.file
            done = 0
            while done < leaf.nbytes:
                count = os.preadv(descriptor, [buffer[leaf.offset + done : leaf.offset + leaf.nbytes]], start + done)
                if not count:
                    raise BaseModelError("the base's weights file became shorter while it was being read")
                done += count

    def spots(
        self, matrices: Sequence[tuple[Sequence[Leaf], int, int, torch.dtype]], left: Collection[int] = ()
    ) -> tuple[list[Spot | None], list[int], int]:
        """Places for the tensors in another buffer: (each leaf's, the start of each matrix, bytes in all).

        A matrix is (leaves, rows, columns, dtype): these lie below one another at its left edge, and the rest of it is
        free. Leaves whose `id` is in `left` get no place, and all others lie one after the other.
        """
        found: dict[int, Spot | None] = dict.fromkeys(left)
        starts, at = [], 0
        for leaves, rows, columns, dtype in matrices:
            each, row = dtype.itemsize, 0
            starts.append(at)
            for leaf in leaves:
                found[id(leaf)] = at + row * columns * each, (columns, 1)
                row += leaf.home.shape[0]
            at += _aligned(rows * columns * each)
        for leaf in self.leaves:
            if id(leaf) not in found:
                found[id(leaf)] = at, None
                at += _aligned(leaf.home.numel() * leaf.dtype.itemsize)
        return [found[id(leaf)] for leaf in self.leaves], starts, at


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def view_of(
    flat: Tensor, offset: int, like: Tensor, dtype: torch.dtype, stride: tuple[int, ...] | None = None
) -> Tensor:
    """A tensor shaped as `like` over a flat buffer's bytes; autograd does not see when the buffer is filled anew."""
    if stride is not None:
        return torch.as_strided(flat.view(dtype), like.shape, stride, offset // dtype.itemsize).data
    count = like.numel() * dtype.itemsize
    return flat[offset : offset + count].view(dtype).view(like.shape).data


def leaves_of(module: nn.Module, dtype: torch.dtype, keep: Callable[[str], bool] = lambda name: False) -> list[Leaf]:
    """A module's frozen tensors, each once. Floating-point parameters are to be computed with in `dtype`.

    `keep(name)` says which parameters keep the dtype they have.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[tuple, Leaf] = {}
    for place in places(module):
        tensor = place.get()
        own = names.get(id(place.owner)) if place.name == "data" else None
        cast = own is not None and tensor.is_floating_point() and not keep(own)
        key = (
            (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)) if tensor.numel() else (id(place.owner), place.name)
        )
        leaf = found.setdefault(key, Leaf([], tensor, dtype if cast else tensor.dtype))
        leaf.places.append(place)
    return list(found.values())


STREAM = "the streamed base: use stream: disk, or quant: nf4"
"""What a streamed base's buffers are for, and the way out where there is no memory for them."""


def host_buffer(nbytes: int, device: torch.device, purpose: str = STREAM) -> Tensor:
    """Bytes of host memory that `device` can copy from at full speed: pinned, and no more than asked for.

    Raises `BaseModelError`, which says the `purpose`, where there is too little.
    """
    try:
        array = np.empty(nbytes, np.uint8)
        if device.type != "cuda" or not nbytes:
            return torch.from_numpy(array)
        torch.from_numpy(array).zero_()  # by all cores: pinning would make its pages one by one
        runtime, at = torch.cuda.cudart(), array.ctypes.data
        if not int(runtime.cudaHostRegister(at, nbytes, 0)):
            weakref.finalize(array, runtime.cudaHostUnregister, at).atexit = False
            return torch.from_numpy(array)
        del array
        with suppress(RuntimeError):
            torch.zeros(1, device=device)  # the next launch would report the failure once more
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)  # this one comes in powers of two
    except (MemoryError, RuntimeError):
        raise BaseModelError(f"no {nbytes / 2**30:.1f} GiB of host memory are left for {purpose}") from None


def hold(leaves: list[Leaf], device: torch.device) -> Block:
    """A block of these tensors in host memory, in their final dtypes; the modules see them there from now on."""
    sources = [leaf.home for leaf in leaves]
    for leaf in leaves:
        leaf.home = torch.empty_like(leaf.home, dtype=leaf.dtype, device="meta")
    block = Block(leaves)
    block.flat = host_buffer(block.nbytes, device)
    for leaf, source in zip(leaves, sources):
        leaf.home = view_of(block.flat, leaf.offset, source, leaf.dtype)
        leaf.home.copy_(source)
    block.put_home()
    return block

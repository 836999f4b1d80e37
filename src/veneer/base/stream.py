"""A frozen base that lives in host memory or on disk: its blocks pass through a few device buffers, one at a time.

The next block is copied while this one computes, so device memory does not grow with the number of blocks. Outside of
`Conveyor.use` every weight of the model is the host's (or a view of the file), so code that looks at weights works.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from veneer.adapter.layers import AdaptedModule
from veneer.adapter.targets import input_embedding, output_head
from veneer.errors import AdapterStateError, BaseModelError
from veneer.kernels.devices import indexed, sent

ALIGN = 256
"""Bytes that the start of each tensor in a buffer is a multiple of, as the allocator's own are."""
CHUNK_BYTES = 64 << 20
"""Bytes of the head's weight that are on the device at once, in each of two buffers."""
SLOTS = 2
COPY_BYTES = 32 << 20
"""Bytes of one copy: what a block's backward pass waits for is not to stand in line behind a whole other block."""


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


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def view_of(flat: Tensor, offset: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor shaped as `like` over a flat buffer's bytes; autograd does not see when the buffer is filled anew."""
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


def host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Bytes of host memory that `device` can copy from at full speed: pinned, and no more than asked for."""
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
        raise BaseModelError(
            f"no {nbytes / 2**30:.1f} GiB of host memory are left for the streamed base: use stream: disk, or quant: nf4"
        ) from None


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


class Conveyor:
    """Brings blocks to the device ahead of their use, through `slots` buffers that are used in turns.

    `resident` of the blocks, spread evenly, have a buffer of their own and are brought once. A block is always in the same
    buffer, so what autograd or a compiled graph keeps of its weights is right again when the block is brought back. On a
    GPU copies run on a stream of their own; files are read by a thread.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device, slots: int = SLOTS, resident: int = 0) -> None:
        self.blocks, self.device = list(blocks), device
        self.cuda = device.type == "cuda"
        count = len(self.blocks)
        stay = [i for i in range(count) if (i + 1) * resident // count > i * resident // count]
        pass_by = [i for i in range(count) if i not in stay]
        self.ahead = min(slots, len(pass_by)) - 1
        """How many blocks are fetched ahead."""
        self.slot_of = {i: n for n, i in enumerate(stay)} | {i: len(stay) + n % slots for n, i in enumerate(pass_by)}
        self.stay = set(stay)
        sizes = [0] * (max(self.slot_of.values()) + 1)
        for i, slot in self.slot_of.items():
            sizes[slot] = max(sizes[slot], self.blocks[i].nbytes)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        on_disk = any(block.flat is None for block in blocks)
        staged = on_disk and device.type != "cpu"
        self.stage = host_buffer(max(sizes), device) if staged else None
        self.left_stage: Any = None
        """The end of the last copy out of the staging buffer."""
        casts = max(block.cast_bytes for block in blocks)
        self.cast = torch.empty(casts, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.worker = ThreadPoolExecutor(1) if on_disk or not self.cuda else None
        self.holds: list[int | None] = [None] * len(sizes)
        self.ready: list[Any] = [None] * len(sizes)
        self.free = [torch.cuda.current_stream(device).record_event() if self.cuda else None for _ in sizes]
        self.copied = 0
        """Bytes brought so far."""
        for block in self.blocks:
            block.views.clear()  # another conveyor's

    @property
    def nbytes(self) -> int:
        """Bytes of all device buffers."""
        return sum(slot.numel() for slot in self.slots) + self.cast.numel()

    def fetch(self, i: int) -> None:
        """Start bringing block i, unless it is there or on its way."""
        slot = self.slot_of[i]
        if self.holds[slot] == i:
            return
        self.holds[slot] = i
        self.copied += self.blocks[i].nbytes
        self.ready[slot] = self.worker.submit(self._bring, i, slot) if self.worker else self._bring(i, slot)

    def _bring(self, i: int, slot: int) -> Any:
        """Copy block i's bytes into its buffer; the end of the copy as an event on a GPU."""
        block, source = self.blocks[i], self.blocks[i].flat
        target = self.slots[slot][: block.nbytes]
        if source is None:
            source = target if self.stage is None else self.stage[: block.nbytes]
            if self.left_stage is not None:
                self.left_stage.synchronize()
            block.read(source)
        if not self.cuda:
            if source is not target:
                target.copy_(source)
            return None
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free[slot])
            for start in range(0, block.nbytes, COPY_BYTES):
                part = slice(start, start + COPY_BYTES)
                target[part].copy_(source[part], non_blocking=True)
            self.left_stage = self.stream.record_event() if source is not block.flat else None
            return self.left_stage or self.stream.record_event()

    def _arrive(self, i: int) -> list[Tensor]:
        """Block i's tensors on the device, once its copy is done."""
        self.fetch(i)
        slot, block = self.slot_of[i], self.blocks[i]
        if isinstance(self.ready[slot], Future):
            self.ready[slot] = self.ready[slot].result()
        if self.ready[slot] is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[slot])
        if slot not in block.views:
            raw = [view_of(self.slots[slot], leaf.offset, leaf.home, leaf.home.dtype) for leaf in block.leaves]
            block.views[slot] = raw + [
                view_of(self.cast, leaf.cast_offset, leaf.home, leaf.dtype) if leaf.dtype != leaf.home.dtype else view
                for leaf, view in zip(block.leaves, raw)
            ]
        raw, views = block.views[slot][: len(block.leaves)], block.views[slot][len(block.leaves) :]
        for stored, view in zip(raw, views):
            if view is not stored:
                view.copy_(stored)
        return views

    @contextmanager
    def use(self, i: int, ahead: Iterable[int] = ()) -> Iterator[list[Tensor]]:
        """Block i on the device for the length of a block of code; the blocks that come next are fetched meanwhile."""
        views = self._arrive(i)
        free = (j for j in ahead if j not in self.stay and self.slot_of[j] != self.slot_of[i])
        for _, j in zip(range(self.ahead), free):
            self.fetch(j)
        block = self.blocks[i]
        for leaf, view in zip(block.leaves, views):
            for place in leaf.places:
                place.put(view)
        try:
            yield views
        finally:
            block.put_home()
            if self.cuda:
                self.free[self.slot_of[i]] = torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        """End the reading thread."""
        if self.worker is not None:
            self.worker.shutdown()


class StreamedBase:
    """What makes a model run whose blocks are `Block`s; found as `model.veneer_stream`.

    The block, embedding and head instances get another `forward`, so the whole model runs as it is, without gradients;
    training is `veneer.training.streamed`. All else is on `device`. `head` holds the output matrix in pieces of rows.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        blocks: Sequence[Block],
        head: Sequence[Block],
        device: torch.device,
        dtype: torch.dtype,
        slots: int = SLOTS,
        resident: int = 0,
    ) -> None:
        self.model, self.modules, self.device, self.dtype = model, list(modules), indexed(device), dtype
        self.conveyor = Conveyor(blocks, self.device, slots, resident)
        self.head = Conveyor(head, self.device)
        self.forget: Callable[[], None] = lambda: None
        """Lets go of the pages of mapped files that were touched."""
        self.tuples: dict[int, int] = {}
        """The length of a block's output, where that is a tuple; known once the model's own forward pass was `seen`."""
        self.seen = False
        self.settle()
        self.install()
        model.veneer_stream = self

    def settle(self) -> None:
        """Move to the device all that does not stream: norms, buffers, and the adapters that were attached."""
        streamed = {id(place.owner) for block in self.conveyor.blocks for leaf in block.leaves for place in leaf.places}
        left = {id(p) for part in (input_embedding(self.model), output_head(self.model)) for p in part.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in streamed | left:
                parameter.data = parameter.data.to(self.device)
        within = {id(part) for module in self.modules for part in module.modules()}
        for part in self.model.modules():
            for name, buffer in part._buffers.items():
                if id(part) not in within and buffer is not None:
                    part._buffers[name] = buffer.to(self.device)

    def install(self) -> None:
        """Let the model's own forward pass stream."""
        for i, module in enumerate(self.modules):
            module.forward = partial(self.run, i)
        input_embedding(self.model).forward = self.lookup
        output_head(self.model).forward = self.logits

    def uninstall(self) -> None:
        """Give the blocks their own forward back."""
        for module in self.modules:
            module.__dict__.pop("forward", None)

    def run(self, i: int, *args: Any, **kwargs: Any) -> Any:
        """Block i on these inputs, without gradients."""
        module = self.modules[i]
        with self.conveyor.use(i, range(i + 1, len(self.modules))):
            out = type(module).forward(module, *args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        if first.requires_grad:
            raise AdapterStateError("a streamed base has gradients in veneer.train alone: use torch.no_grad() here")
        if isinstance(out, tuple):
            self.tuples[i] = len(out)
        self.seen = self.seen or i == len(self.modules) - 1
        return out

    def lookup(self, ids: Tensor, known: Tensor | None = None) -> Tensor:
        """The embedding on the device; only the rows that occur are copied there. `known`: the ids on the host."""
        embedding = input_embedding(self.model)
        table, padding = embedding.weight.data, embedding.padding_idx
        unique, where = (ids.cpu() if known is None else known.view(ids.shape)).unique(return_inverse=True)
        rows = torch.empty(len(unique), table.shape[1], dtype=table.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(table, 0, unique, out=rows)
        embedding.weight.data, embedding.padding_idx = rows.to(self.device, non_blocking=True).to(self.dtype), None
        try:
            return type(embedding).forward(embedding, sent(where, self.device))
        finally:
            embedding.weight.data, embedding.padding_idx = table, padding
            self.forget()

    def head_pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows of the output matrix on the device) over the vocabulary; each is valid until the next."""
        start, count = 0, len(self.head.blocks)
        for i in range(count):  # the first piece comes after the last: the next pass finds it there
            with self.head.use(i, [*range(i + 1, count), *range(i)]) as (weight,):
                yield start, weight
                start += weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head, (…, d) → (…, V)."""
        bias = output_head(self.model).bias
        out = torch.cat([hidden @ weight.t() for _, weight in self.head_pieces()], dim=-1)
        return out if bias is None else out + bias.to(out)


def frozen_blocks(model: nn.Module) -> list[nn.Module]:
    """A model's blocks, found by structure: the items of the outermost module list that holds the most parameters.

    `BaseModelError` where there is none, or where it is not of one class.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    if not lists:
        raise BaseModelError(f"{type(model).__name__} has no list of blocks to stream: use stream: off")
    most = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))  # the first, so the outermost
    if len({type(block) for block in most}) > 1:
        raise BaseModelError(f"{type(model).__name__} has blocks of several classes, which do not stream")
    return list(most)


def check_streamable(model: nn.Module) -> None:
    """`BaseModelError` for a model whose parts do not stream."""
    name, head, embedding = type(model).__name__, output_head(model), input_embedding(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise BaseModelError(f"{name} is an encoder-decoder model, and only decoders stream: use stream: off")
    if head is None or embedding is None:
        raise BaseModelError(f"{name} has no output head or no input embedding: it does not stream; use stream: off")
    if type(head) is not nn.Linear or isinstance(embedding, AdaptedModule) or not isinstance(embedding, nn.Embedding):
        raise BaseModelError(
            f"{name}'s head or embedding is adapted or of a kind that does not stream; use stream: off"
        )

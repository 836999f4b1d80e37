"""A frozen base that lives in host memory or on disk: its blocks pass through a few device buffers, one at a time.

The next block is copied while this one computes, so device memory does not grow with the number of blocks. Outside of
`Conveyor.use` every weight of the model is the host's (or a view of the file), so code that looks at weights works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.blocks import staying
from veneer.adapter.layers import AdaptedModule
from veneer.adapter.targets import input_embedding, output_head
from veneer.base.held import Block, Spot, host_buffer, view_of
from veneer.base.host_embedding import embedded
from veneer.errors import AdapterStateError, BaseModelError
from veneer.kernels.devices import indexed, sent

CHUNK_BYTES = 64 << 20
"""Bytes of the head's weight that are on the device at once, in each of two buffers."""
SLOTS = 2
COPY_BYTES = 32 << 20
"""Bytes of one copy: what a block's backward pass waits for is not to stand in line behind a whole other block."""


class Conveyor:
    """Brings blocks to the device ahead of their use, through `slots` buffers that are used in turns.

    `resident` of the blocks, spread evenly, have a buffer of their own and are brought once. A block is always in the same
    buffer, so what autograd or a compiled graph keeps of its weights is right again when the block is brought back. On a
    GPU copies run on a stream of their own; files are read by a thread.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device, slots: int = SLOTS, resident: int = 0) -> None:
        self.blocks, self.device, self.usual = list(blocks), device, slots
        self.cuda = device.type == "cuda"
        self.stay = staying(len(self.blocks), resident)
        on_disk = any(block.flat is None for block in blocks)
        staged = on_disk and device.type != "cpu"
        self.stage = host_buffer(max(block.nbytes for block in blocks), device) if staged else None
        self.left_stage: Any = None
        """The end of the last copy out of the staging buffer."""
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.worker = ThreadPoolExecutor(1) if on_disk or not self.cuda else None
        self.copied = 0
        """Bytes brought so far."""
        self.slots: list[Tensor] = []
        self.ready: list[Any] = []
        self.arrange()

    def arrange(
        self,
        spots: Sequence[Sequence[Spot | None]] = (),
        nbytes: int = 0,
        arrived: Callable[[int, list[Tensor]], None] = lambda i, raw: None,
    ) -> None:
        """Make the buffers. With `spots` (of each block) there is one to copy to, and one of `nbytes` to compute from.

        Each block's tensors are moved there as it is used, each to its spot (None: it is not moved, and modules go on
        seeing the host's); then `arrived` is called with its number and its tensors as they were copied, which it may
        read on the current stream. What else lies in that buffer is the caller's, and zero at first. The next block is
        copied meanwhile.
        """
        for ready in self.ready:
            if isinstance(ready, Future):
                ready.exception()  # once it is done; of no use any more if it failed
        if self.stream is not None:
            self.stream.synchronize()
        for block in self.blocks:
            block.views.clear()  # of the buffers before, or another conveyor's
        self.slots.clear()
        self.cast, self.spots, self.arrived = None, list(spots), arrived
        pass_by = [i for i in range(len(self.blocks)) if i not in self.stay]
        slots = 1 if spots else self.usual
        self.ahead = min(self.usual if spots else slots, len(pass_by)) - 1
        """How many blocks are fetched ahead."""
        own = len(self.stay)
        self.slot_of = {i: n for n, i in enumerate(sorted(self.stay))}
        self.slot_of |= {i: own + n % slots for n, i in enumerate(pass_by)}
        sizes = [0] * (max(self.slot_of.values()) + 1)
        for i, slot in self.slot_of.items():
            sizes[slot] = max(sizes[slot], self.blocks[i].nbytes)
        empty = partial(torch.empty, dtype=torch.uint8, device=self.device)
        kept = empty(sum(sizes[:own])).split(sizes[:own]) if own else []  # at once: no allocator rounds each of them up
        self.slots = [*kept, *map(empty, sizes[own:])]
        size = nbytes if spots else max(block.cast_bytes for block in self.blocks)
        self.cast = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self.holds: list[int | None] = [None] * len(sizes)
        self.ready = [None] * len(sizes)
        self.free = [torch.cuda.current_stream(self.device).record_event() if self.cuda else None for _ in sizes]

    def let_pass(self) -> None:
        """Let no block stay on the device any more; the buffers are made anew."""
        self.stay = frozenset()
        self.arrange()

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

    def _arrive(self, i: int) -> list[Tensor | None]:
        """Block i's tensors on the device, once its copy is done; None for those that are not moved."""
        self.fetch(i)
        slot, block = self.slot_of[i], self.blocks[i]
        if isinstance(self.ready[slot], Future):
            self.ready[slot] = self.ready[slot].result()
        if self.ready[slot] is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[slot])
        if slot not in block.views:
            block.views[slot] = self._views(i, slot)
        raw, views = block.views[slot][: len(block.leaves)], block.views[slot][len(block.leaves) :]
        for stored, view in zip(raw, views):
            if view is not None and view is not stored:
                copy(view.data, stored)  # autograd does not see it
        if self.spots:
            self.arrived(i, raw)
            self._left(slot)
        return views

    def _views(self, i: int, slot: int) -> list[Tensor | None]:
        """Block i's tensors as they come, then as they are computed with."""
        leaves = self.blocks[i].leaves
        raw = [view_of(self.slots[slot], leaf.offset, leaf.home, leaf.home.dtype) for leaf in leaves]
        if self.spots:
            spots = zip(leaves, self.spots[i])
            return raw + [spot and view_of(self.cast, spot[0], leaf.home, leaf.dtype, spot[1]) for leaf, spot in spots]
        return raw + [
            view_of(self.cast, leaf.cast_offset, leaf.home, leaf.dtype) if leaf.dtype != leaf.home.dtype else view
            for leaf, view in zip(leaves, raw)
        ]

    def _left(self, slot: int) -> None:
        """The buffer may be filled anew once the device is done with what it was given so far."""
        if self.cuda:
            self.free[slot] = torch.cuda.current_stream(self.device).record_event()

    @contextmanager
    def use(self, i: int, ahead: Iterable[int] = ()) -> Iterator[list[Tensor]]:
        """Block i on the device for the length of a block of code; the blocks that come next are fetched meanwhile."""
        views = self._arrive(i)
        slot = None if self.spots else self.slot_of[i]  # with spots, block i has left it
        free = (j for j in ahead if j not in self.stay and self.slot_of[j] != slot)
        for _, j in zip(range(self.ahead), free):
            self.fetch(j)
        block = self.blocks[i]
        for leaf, view in zip(block.leaves, views):
            for place in leaf.places if view is not None else ():
                place.put(view)
        try:
            yield views
        finally:
            block.put_home()
            if not self.spots:
                self._left(self.slot_of[i])

    def close(self) -> None:
        """End the reading thread."""
        if self.worker is not None:
            self.worker.shutdown()


def copy(target: Tensor, source: Tensor) -> None:
    """target ← source; a matrix, whose rows may stand apart in the target, eight bytes at a time where that goes."""
    same = target.dtype == source.dtype and target.ndim == 2
    if same and all((n * target.element_size()) % 8 == 0 for n in (target.shape[1], target.stride(0))):
        target, source = target.view(torch.int64), source.view(torch.int64)
    target.copy_(source)


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
        table = embedding.weight.data
        unique, where = (ids.cpu() if known is None else known.view(ids.shape)).unique(return_inverse=True)
        rows = torch.empty(len(unique), table.shape[1], dtype=table.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(table, 0, unique, out=rows)
        there = rows.to(self.device, non_blocking=True).to(self.dtype)
        try:
            return embedded(embedding, there, sent(where, self.device))
        finally:
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

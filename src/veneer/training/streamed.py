"""Training over a streamed base: every row of a step passes through a block before the next block is brought.

Layer by layer, so that one copy of a block serves the whole step's tokens; the backward pass takes the blocks in reverse.
What a block keeps is for `Accelerated`'s dial to say, as on a resident base: the same code runs, so gradients are the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.random import fork_rng

from veneer.adapter.attach import get_bank
from veneer.adapter.layers import AdaptedModule
from veneer.adapter.targets import input_embedding, output_head
from veneer.base.stream import StreamedBase
from veneer.data.example import TokenizedExample
from veneer.data.pack import Row
from veneer.errors import BaseModelError, ConfigError
from veneer.kernels import dispatch
from veneer.kernels.streamed_head import streamed_cross_entropy
from veneer.training.accelerate import Accelerated
from veneer.training.arriving import Arriving
from veneer.training.chunks import LONG
from veneer.training.forward import RowModel
from veneer.training.lower import Start
from veneer.training.packing import watch
from veneer.training.store import Mode

EVAL_TOKENS = 16384
"""Tokens that an evaluation takes through the blocks at once."""
HEAD_ROWS = 8192
"""Positions of several rows that go through a head in pieces at once: each piece is copied once for all of them."""


class _AtLastBlock(Exception):
    """Ends a pass of the model's forward that only looks at what the blocks are called with."""


class _Inlet(torch.autograd.Function):
    """A block's input, which autograd does not hold on to by itself; its gradient goes to a list."""

    @staticmethod
    def forward(ctx, seed, hidden, box):
        ctx.box = box
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        ctx.box.append(grad)
        return None, None, None


class StreamedRows(RowModel):
    """A `RowModel` over a streamed base with an adapter; a context in which `losses` and `backward` work.

    The model's own forward pass tells with which arguments it calls each block, and what comes after the last: blocks
    are stood in for by functions that note the arguments and pass the hidden states through.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        packing: bool = True,
        modes: Mode | Sequence[Mode] = "recompute",
        keep: int = 0,
        compile: bool = False,
        dynamic: bool = True,
        note: Callable[[str], None] = print,
    ) -> None:
        self.base: StreamedBase = model.veneer_stream
        check_adapters(model)
        super().__init__(model, packing=packing, place=(self.base.device, self.base.dtype))
        # Keeping all would grow with the tokens as on a resident base, and defeat the purpose.
        modes = "recompute" if modes == "keep" else modes
        self.fast = Accelerated(
            model, modes=modes, keep=keep, compile=compile, dynamic=dynamic, note=note, device=self.base.device,
            packs=False,  # `_pack` does
            lean=True, long=LONG,
        )  # fmt: skip
        self._keep_out()
        self.blocks, self.last = self.base.modules, len(self.base.modules) - 1
        trained = [any(p.requires_grad for p in block.parameters()) for block in self.blocks]
        self.lowest = trained.index(True)
        self._noted: list[tuple[tuple, dict]] | None = None
        self._first: Tensor | None = None
        self._final: Tensor | None = None
        self._ids: Tensor | None = None
        self._for_head: list[tuple[Tensor, Tensor]] | None = None
        """Hidden states and targets of rows that go through the head together, while they are collected."""
        self._inputs: dict[int, tuple] = {}
        self._packed = False
        self.arriving: Arriving | None = None
        self._seed = torch.zeros(0, device=self.device, requires_grad=True)

    def __enter__(self) -> StreamedRows:
        self.base.uninstall()
        self.fast.__enter__()
        self._packed = False
        self.calls = [block.forward for block in self.blocks]
        for i, block in enumerate(self.blocks):
            block.forward = partial(self._stand_in, i)
        input_embedding(self.model).forward = self._embed
        return self

    def __exit__(self, *error: object) -> None:
        self.fast.__exit__(*error)
        if self.arriving is not None:
            self.arriving.close()
            self.arriving = None
        self.base.install()

    def start(self) -> None:
        """As `Accelerated.start`; `backward` does it itself."""

    def check(self, examples: Sequence[TokenizedExample], required: bool = False) -> None:
        """As `RowModel.check`, and that the blocks come one after the other. `BaseModelError` where they do not."""
        with self:
            self.calls = [partial(type(block).forward, block) for block in self.blocks]
            self._packed = True  # nothing is compiled for it, so nothing is to be packed
            super().check(examples, required)
        if not self.fast_head:
            raise BaseModelError(
                f"{type(self.model).__name__} is not an embedding, blocks one after the other and a head times the hidden "
                f"states, so it does not stream: use stream: off"
            )

    def _whole(self, row: Row) -> float:
        """The row's loss by the model's own forward pass, which tells what kind of output blocks have."""
        with self.row(row) as loss:
            return float(loss)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """No dropout."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def _stand_in(self, i: int, *args: Any, **kwargs: Any) -> Any:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self._noted is not None:
            if i == 0:
                self._first = hidden
            self._noted.append((args, kwargs))
            if i == self.last:
                raise _AtLastBlock
        elif self._final is not None:
            hidden = self._final if i == self.last else hidden
        else:
            return self.base.run(i, hidden, *args, **kwargs)
        return (hidden, *[None] * (self.base.tuples[i] - 1)) if i in self.base.tuples else hidden

    def _embed(self, ids: Tensor) -> Tensor:
        return self.base.lookup(ids, self._ids) if self._final is None else self._final.detach()

    def _head_loss(self, hidden: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        bias, options = output_head(self.model).bias, {"softcap": self.head.softcap, "logit_scale": self.head.scale}
        if self._for_head is not None:
            self._for_head.append((hidden, targets))
            return hidden.new_zeros(())
        options["reduction"] = reduction
        if len(self.base.head.blocks) > 1:
            return streamed_cross_entropy(hidden, self.base.head_pieces, bias, targets, **options)
        with self.base.head.use(0) as (weight,):
            return dispatch.linear_cross_entropy(hidden, weight, bias, targets, **options)

    @torch.no_grad()
    def _note(self, row: Row) -> tuple[list[tuple[tuple, dict]], Tensor]:
        """With what the model calls each block for this row, and the first hidden states."""
        self._noted, self._ids = [], torch.from_numpy(row.input_ids)
        try:
            with self.row(row):
                pass
        except _AtLastBlock:
            pass
        finally:
            noted, first = self._noted, self._first
            self._noted = self._first = self._ids = None
        return noted, first

    def _after(self, rows: Sequence[Row], hidden: Sequence[Tensor]) -> list[Tensor]:
        """The rows' losses from the last block's output on. A head in pieces comes once for all of them."""
        self._for_head = [] if len(rows) > 1 else None
        losses = []
        try:
            for row, self._final in zip(rows, hidden, strict=True):
                with self.in_force(row):
                    losses.append(self.loss(row))
            found = self._for_head
        finally:
            self._final = self._for_head = None
        if found is None:
            return losses
        states, targets = zip(*found)
        parts = self._head_loss(torch.cat(states), torch.cat(targets), "none").split([len(t) for t in targets])
        return [part.sum() for part in parts]

    def _together(self, rows: Sequence[Row]) -> list[range]:
        """Which rows go through the head at once: those of `HEAD_ROWS` positions, if it comes in pieces."""
        found, start, count = [], 0, 0
        for r, row in enumerate(rows):
            count += len(row.targets)
            if r > start and (count > HEAD_ROWS or len(self.base.head.blocks) == 1 or not self.fast_head):
                found.append(range(start, r))
                start, count = r, len(row.targets)
        return [*found, range(start, len(rows))] if rows else []

    def inputs(self, row: Row, start: Start | None = None) -> tuple:
        """As `RowModel.inputs`, made once for a step."""
        if start is not None:
            return super().inputs(row, start)
        if id(row) not in self._inputs:
            self._inputs[id(row)] = row, super().inputs(row)
        return self._inputs[id(row)][1]

    def _prepare(self, row: Row) -> None:
        """Before the first block's turn: what is known of the model after its first call, and up-to-date factors."""
        self._inputs.clear()
        if not self.base.seen:
            ids = row.input_ids[:8]
            with self._quiet(), torch.no_grad():
                self._whole(self.pack([TokenizedExample(ids, np.ones(len(ids), bool))], 8, False)[0])
        if self.fast.compile and not self._packed:
            calls, hidden = self._note(row)
            with self.in_force(row):
                self._pack(hidden, *calls[0])
        self.fast.start()

    @torch.no_grad()
    def _pack(self, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        """As `Accelerated` does for compiled blocks, in the one buffer that blocks are computed from."""
        self._packed, first = True, self.blocks[0]
        with self.base.conveyor.use(0), fork_rng([self.device] if self.device.type == "cuda" else []):
            with watch(first) as names:
                type(first).forward(first, hidden, *args, **kwargs)
        alike = [block if type(block) is type(first) else None for block in self.blocks]
        self.arriving = Arriving(self.base.conveyor)
        self.arriving.pack(alike, names)
        self._keep_out()

    def _keep_out(self) -> None:
        """What blocks save of their weights stays where it is."""
        stay = [*self.model.parameters(), *self.base.conveyor.slots, self.base.conveyor.cast]
        self.fast.store.keep_out(tensor for tensor in stay if tensor.numel())

    def losses(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """The loss of each row, without gradients."""
        start = 0
        while start < len(rows):
            stop, tokens = start + 1, len(rows[start].input_ids)
            while stop < len(rows) and tokens + len(rows[stop].input_ids) <= EVAL_TOKENS:
                tokens += len(rows[stop].input_ids)
                stop += 1
            yield from self._losses(rows[start:stop])
            start = stop

    @torch.no_grad()
    def _losses(self, rows: Sequence[Row]) -> list[Tensor]:
        self._prepare(rows[0])
        calls, hidden = (list(found) for found in zip(*map(self._note, rows)))
        for i, call in enumerate(self.calls):
            with self.base.conveyor.use(i, range(i + 1, len(self.calls))):
                for r, row in enumerate(rows):
                    args, kwargs = calls[r][i]
                    with self.in_force(row):
                        hidden[r] = _hidden(call(hidden[r], *args, **kwargs))
        losses = []
        for part in self._together(rows):
            losses += self._after([rows[r] for r in part], [hidden[r] for r in part])
        return losses

    def backward(
        self, rows: Sequence[Row], supervised: int, stop: Callable[[], Any] = lambda: False
    ) -> list[Tensor] | None:
        """Add the gradients of Σ loss/supervised to the adapter's; the loss of each row. None if `stop` said so.

        Rows are taken backwards in the forward pass, so that the backward pass has them in order, as on a resident base,
        and what was sent to the host last is brought back first.
        """
        self._prepare(rows[0])
        calls, hidden, tape = [None] * len(rows), [None] * len(rows), {}
        for i in range(len(self.blocks)):
            if stop():
                return None
            kept: list[tuple[GradientEdge, list[Tensor]] | None] = []
            with self.base.conveyor.use(i, range(i + 1, len(self.blocks))):
                for r in reversed(range(len(rows))):
                    if i == 0:  # row by row: the host looks up the next row's embeddings while the GPU computes
                        calls[r], hidden[r] = self._note(rows[r])
                    kept.append(self._forward(i, rows[r], hidden, r, calls[r]))
            tape[i] = kept[::-1]
        losses, grads = self._head_backward(rows, hidden, supervised)
        for i in range(self.last, self.lowest - 1, -1):
            if stop():
                return None
            kept = tape.pop(i)
            with self.base.conveyor.use(i, range(i - 1, self.lowest - 1, -1)):
                for r, row in enumerate(rows):
                    (edge, box), kept[r] = kept[r], None
                    with self.in_force(row):
                        torch.autograd.backward(edge, grads[r])
                    grads[r] = box.pop() if box else None
                    del edge
        return losses

    def _head_backward(
        self, rows: Sequence[Row], hidden: list[Tensor | None], supervised: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(the loss of each row, the gradient of its last hidden states); empties `hidden`."""
        losses, grads = [], []
        for part in self._together(rows):
            final = [hidden[r].requires_grad_() for r in part]
            hidden[part.start : part.stop] = [None] * len(part)
            found = self._after([rows[r] for r in part], final)
            torch.autograd.backward([loss / supervised for loss in found])
            losses += [loss.detach() for loss in found]
            grads += [f.grad for f in final]
        return losses, grads

    def _forward(
        self, i: int, row: Row, hidden: list[Tensor], r: int, calls: list[tuple[tuple, dict]]
    ) -> tuple[GradientEdge, list[Tensor]] | None:
        """Block i on row r, whose hidden states are replaced; what its backward pass starts from."""
        (args, kwargs), calls[i] = calls[i], None
        x, box = hidden[r], []
        hidden[r] = None
        with self.in_force(row), torch.set_grad_enabled(i >= self.lowest):
            if i > self.lowest:
                x = _Inlet.apply(self._seed, x, box)
            out = _hidden(self.calls[i](x, *args, **kwargs))
        hidden[r] = out.detach()
        return (get_gradient_edge(out), box) if i >= self.lowest else None


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def check_adapters(model: nn.Module) -> None:
    """`ConfigError` for what is trained and does not go with streaming, with one line that says why."""
    bank, base = get_bank(model), model.veneer_stream
    inside = {id(part) for block in base.modules for part in block.modules()}
    for path, layer in bank.layers.items():
        owner = layer.__dict__.get("owner", layer)
        if id(layer) not in inside and id(owner) not in inside:
            raise ConfigError(
                f"train.stream: {path} is adapted, and only adapters inside the blocks stream: leave it out"
            )
    entries = bank.entries.values()
    for entry in entries:
        reasons = {
            "modules_to_save trains whole modules": entry.modules,
            "trained tokens change the embedding, which stays on the host": entry.tokens,
            "adapter.bias trains weights that stay on the host": entry.biases,
            "adapter.invocation (aLoRA) looks at whole sequences at once": entry.config.invocation,
        }
        for reason, there in reasons.items():
            if there:
                raise ConfigError(f"train.stream: {reason}: leave it out or use stream: off")
    if not any(isinstance(part, AdaptedModule) for block in base.modules for part in block.modules()):
        raise ConfigError("train.stream: no block is adapted")

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

from veneer.adapter import quantised
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
from veneer.training.forward import RowModel
from veneer.training.packing import watch
from veneer.training.store import Mode

EVAL_TOKENS = 16384
"""Tokens that an evaluation takes through the blocks at once."""


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
            packs=False,  # a packed matrix of every block would stay on the device
        )  # fmt: skip
        slots = [*self.base.conveyor.slots, self.base.conveyor.cast]
        self.fast.store.frozen |= {slot.untyped_storage().data_ptr() for slot in slots if slot.numel()}
        self.blocks, self.last = self.base.modules, len(self.base.modules) - 1
        trained = [any(p.requires_grad for p in block.parameters()) for block in self.blocks]
        self.lowest = trained.index(True)
        self._noted: list[tuple[tuple, dict]] | None = None
        self._first: Tensor | None = None
        self._final: Tensor | None = None
        self._packed = False
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
        self.base.install()

    def start(self) -> None:
        """As `Accelerated.start`; `backward` does it itself."""

    def check(self, examples: Sequence[TokenizedExample], required: bool = False) -> None:
        """As `RowModel.check`, and that the blocks come one after the other. `BaseModelError` where they do not."""
        with self:
            self.calls = [partial(type(block).forward, block) for block in self.blocks]  # nothing is compiled for it
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
        return self.base.lookup(ids) if self._final is None else self._final.detach()

    def _head_loss(self, hidden: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        bias, options = output_head(self.model).bias, {"softcap": self.head.softcap, "logit_scale": self.head.scale}
        if len(self.base.head.blocks) > 1:
            if reduction != "sum":
                raise ConfigError("a streamed head gives a row's summed loss, not one for each token: use stream: off")
            return streamed_cross_entropy(hidden, self.base.head_pieces, bias, targets, **options)
        with self.base.head.use(0) as (weight,):
            return dispatch.linear_cross_entropy(hidden, weight, bias, targets, reduction=reduction, **options)

    @torch.no_grad()
    def _note(self, row: Row) -> tuple[list[tuple[tuple, dict]], Tensor]:
        """With what the model calls each block for this row, and the first hidden states."""
        self._noted = []
        try:
            with self.row(row):
                pass
        except _AtLastBlock:
            pass
        finally:
            noted, first = self._noted, self._first
            self._noted = self._first = None
        return noted, first

    def _after(self, row: Row, hidden: Tensor) -> Tensor:
        """The row's loss from the last block's output on."""
        self._final = hidden
        try:
            return self.loss(row)
        finally:
            self._final = None

    def _first_blocks(self, rows: Sequence[Row]) -> tuple[list[list[tuple[tuple, dict]]], list[Tensor]]:
        if not self.base.seen:
            ids = rows[0].input_ids[:8]
            with self._quiet(), torch.no_grad():
                self._whole(self.pack([TokenizedExample(ids, np.ones(len(ids), bool))], 8, False)[0])
        calls, hidden = zip(*map(self._note, rows))
        if self.fast.compile and not self._packed:
            with self.in_force(rows[0]):
                self._pack(hidden[0], *calls[0][0])
        return list(calls), list(hidden)

    @torch.no_grad()
    def _pack(self, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        """As `Accelerated` does for compiled blocks, the 4-bit linears alone: a float matrix would stay on the device.

        What is kept of the packed weights are views of the buffer that a block is always brought to.
        """
        self._packed, first = True, self.blocks[0]
        with self.base.conveyor.use(0), fork_rng([self.device] if self.device.type == "cuda" else []):
            with watch(first) as names:
                type(first).forward(first, hidden, *args, **kwargs)
        for i, block in enumerate(self.blocks):
            four_bits = [
                group
                for group in names
                if group and type(block) is type(first)
                if quantised.method(block.get_submodule(group[0]).base_layer) in ("nf4", "fp4")
            ]
            if four_bits:
                with self.base.conveyor.use(i, range(i + 1, len(self.blocks))):
                    self.fast.packing.pack([block], four_bits)
        self.fast.packing.refresh()

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
        calls, hidden = self._first_blocks(rows)
        for i, call in enumerate(self.calls):
            with self.base.conveyor.use(i, range(i + 1, len(self.calls))):
                for r, row in enumerate(rows):
                    args, kwargs = calls[r][i]
                    with self.in_force(row):
                        hidden[r] = _hidden(call(hidden[r], *args, **kwargs))
        losses = []
        for r, row in enumerate(rows):
            with self.in_force(row):
                losses.append(self._after(row, hidden[r]))
        return losses

    def backward(
        self, rows: Sequence[Row], supervised: int, stop: Callable[[], Any] = lambda: False
    ) -> list[Tensor] | None:
        """Add the gradients of Σ loss/supervised to the adapter's; the loss of each row. None if `stop` said so.

        Rows are taken backwards in the forward pass, so that the backward pass has them in order, as on a resident base,
        and what was sent to the host last is brought back first.
        """
        self.fast.start()
        calls, hidden = self._first_blocks(rows)
        tape: dict[int, list[tuple[GradientEdge, list[Tensor]]]] = {}
        for i in range(len(self.blocks)):
            if stop():
                return None
            with self.base.conveyor.use(i, range(i + 1, len(self.blocks))):
                kept = [self._forward(i, row, hidden, r, calls[r]) for r, row in reversed(list(enumerate(rows)))]
            tape[i] = kept[::-1]
        losses, grads = [], []
        for r, row in enumerate(rows):
            final = hidden[r].requires_grad_()
            hidden[r] = None
            with self.in_force(row):
                loss = self._after(row, final)
                (loss / supervised).backward()
            losses.append(loss.detach())
            grads.append(final.grad)
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

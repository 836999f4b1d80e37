"""What a training step makes, moves and keeps: the real model run on the meta device, where nothing is computed.

Every operation of a forward and a backward pass is seen with its shapes, and every tensor with its birth and death. So
the numbers hold for any architecture and adapter, without weights and without the device. Attention is stood in for by a
function that keeps what the fused kernels keep; the loss by one that keeps what `kernels.cross_entropy` keeps, whose
chunks are plain arithmetic (`plan.bytes`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface

from veneer.adapter.attach import get_bank
from veneer.adapter.blocks import repeated_blocks
from veneer.adapter.calls import recorded
from veneer.adapter.layers import AdaptedLinear
from veneer.errors import BaseModelError

ATTENTION = "veneer_plan"
Rows = Literal["equal", "mixed", "split"]
"""How rows meet attention: on a GPU with sequences of one length or of several, elsewhere one sequence at a time."""
GRAIN = 512
"""Bytes that an allocation is rounded up to, on a GPU (c10's kMinBlockSize) and by and large in malloc."""
IN_PLACE = {"addmm_": torch.ops.aten.addmm}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "_grouped_mm"}


ABOUT = ("dear", "widened", "parcels", "inputs", "heads", "groups")


@dataclass
class Phase:
    """A stretch of a step: `start`, `peak` and `end` are live bytes since the step began, without the model's own;
    `ops` are (name, FLOPs, bytes read and written)."""

    start: int
    peak: int
    end: int = 0
    ops: list[tuple[str, float, float]] = field(default_factory=list)


@dataclass
class Trace:
    """One step of T tokens through the blocks `index` of a model. Phases: embed, forward.N …, head, tail, backward.N …

    By block: `inputs`, the bytes of its hidden states; `parcels`, the bytes of each tensor that autograd saves, as often
    as it does (what several operations save is sent to the host once for each); `dear`, the bytes of what is kept and is
    dear to compute again: outputs of products, what attention keeps, and of a norm's float32 copy the tensor that it was
    made of; `widened`, what keys and values have besides where attention has them widened to all heads; `heads`,
    queries' heads times their width; `groups`, the adapted linears that have one input.
    """

    tokens: int
    index: list[int]
    phases: dict[str, Phase]
    dear: list[int]
    widened: list[int]
    parcels: list[list[int]]
    inputs: list[int]
    heads: list[int]
    groups: list[list[list[str]]]


class Tally(TorchDispatchMode):
    """Counts live bytes and operations by phase while it is active."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.live, self.phases = dtype, 0, {}
        self.known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.phase: Phase | None = None
        self.heads = 0

    def enter(self, name: str) -> None:
        if self.phase is not None:
            self.phase.end = self.live
        self.phase = self.phases[name] = Phase(self.live, self.live)

    def leave(self) -> None:
        self.phase.end = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views:
            self.count(func, args, kwargs, made, inputs, outputs)
        return made

    def count(self, func, args, kwargs, made, inputs, outputs) -> None:
        name = func.overloadpacket.__name__
        flops = flop_registry.get(func.overloadpacket) or flop_registry.get(IN_PLACE.get(name))
        work = float(flops(*args, **kwargs, out_val=made)) if flops else 0.0
        if name == "_grouped_mm":  # experts: (rows, K) times one of (experts, K, M)
            work = 2.0 * args[0].numel() * args[1].shape[-1]
        moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        if name not in ("empty", "empty_like", "new_empty", "empty_strided", "detach"):
            self.phase.ops.append((name, work, float(moved)))
        for t in outputs:
            self.add(t)
        if name in PRODUCTS:
            for t in outputs:
                self.mark(t)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        self.known[storage] = [size, tensor.dtype, 0]
        self.live += size
        self.phase.peak = max(self.phase.peak, self.live)
        weakref.finalize(storage, self.drop, size)

    def drop(self, size: int) -> None:
        self.live -= size

    def mark(self, tensor: Tensor, copies: int = 1) -> None:
        """This tensor, or the one that it holds so many copies of, is dear to compute again."""
        if (found := self.known.get(tensor.untyped_storage())) is not None:
            found[2] = copies

    def storages(self) -> dict[int, list]:
        return {id(storage): about for storage, about in self.known.items()}


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, its output and one float32 a head and token, and computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[1:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, _ = ctx.saved_tensors
        half = query.dtype != torch.float32
        total = query.new_empty(query.shape, dtype=torch.float32) if half else None  # the kernels add up dq in it
        made = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        del total
        return made


@contextmanager
def _stand_in(model: nn.Module, tally: Tally, rows: Rows) -> Iterator[None]:
    """Attention with the shapes that `kernels.attention` makes on such rows."""

    def attention(module, query, key, value, attention_mask, **extra):
        groups = query.shape[1] // key.shape[1]
        tally.heads = query.shape[1] * query.shape[3]
        copies = groups if rows != "equal" else 1
        if copies > 1:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        out = _Attention.apply(query, key, value)
        for t, count in ((query, 1), (key, copies), (value, copies), (out, 1)):
            tally.mark(t, count)
        return (torch.cat([out], dim=2) if rows == "split" else out).transpose(1, 2), None

    AttentionInterface.register(ATTENTION, attention)
    own = getattr(model.config, "_attn_implementation", None)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class _Loss(torch.autograd.Function):
    """Keeps the gradient of the hidden states, as `kernels.cross_entropy` does."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.save_for_backward(torch.empty_like(hidden))
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return kept * grad.to(kept.dtype)


def trace(model: nn.Module, tokens: int, *, rows: Rows) -> Trace:
    """A step of one row, all tokens supervised, on an adapted model of the meta device.

    Of blocks that are alike only one is run; the first is run for itself, as no gradient goes below it. Raises
    `BaseModelError` where the model does not run on the meta device.
    """
    blocks, bank = repeated_blocks(model), get_bank(model)
    if not blocks:
        raise BaseModelError(f"{type(model).__name__}: no repeated blocks with adapted layers were found to plan for")
    tally, about = Tally(next(model.parameters()).dtype), {key: [] for key in ABOUT}
    taken = [p.register_post_accumulate_grad_hook(_drop) for p in bank.parameters("default").values()]
    index = sorted(set(alike(blocks)))
    for i, block in enumerate(blocks):
        block.forward = _watched(block, i, tally, about) if i in index else _through(about)
    model.train()
    try:
        with _stand_in(model, tally, rows), tally:
            _step(model, tokens, tally)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError) as error:
        text = " ".join(str(error).split())[:200]
        raise BaseModelError(f"{type(model).__name__} cannot be planned for: its step does not run: {text}") from error
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
        for hook in taken:
            hook.remove()
        about.pop("tuple", None)
    return Trace(tokens, index, tally.phases, **about)


def _step(model: nn.Module, tokens: int, tally: Tally) -> None:
    tally.enter("embed")
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    places = torch.zeros(tokens, dtype=torch.int64, device="meta")
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].index_select(0, places)
    loss = _Loss.apply(hidden)
    tally.enter("tail")
    del hidden
    loss.backward()
    tally.leave()


def alike(blocks: list[nn.Module]) -> list[int]:
    """For each block the first one with the same parts, shapes and kind of attention; the very first is like no other."""
    seen: dict[Any, int] = {}
    found = [0]
    for i, block in enumerate(blocks[1:], 1):
        parts = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
        kind = [getattr(m, key, None) for m in block.modules() for key in ("sliding_window", "attention_type")]
        found.append(seen.setdefault((type(block), parts, str(kind)), i))
    return found


def _drop(parameter: nn.Parameter) -> None:
    """Gradients add up in buffers that are counted elsewhere."""
    parameter.grad = None


def _through(about: dict[str, list]) -> Callable:
    """The forward of a block that is left out."""

    def call(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if about.get("tuple") else hidden

    return call


def _watched(block: nn.Module, index: int, tally: Tally, about: dict[str, list]) -> Callable:
    """A block's forward that tells the tally where it begins and ends, and later its backward."""
    forward, linears = block.forward, {n: m for n, m in block.named_modules() if type(m) is AdaptedLinear}

    def call(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        before = set(tally.storages()) - {id(hidden.untyped_storage())}
        tally.enter(f"forward.{index}")
        parcels: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage in tally.known and id(storage) not in before:
                parcels.append(tensor.numel() * tensor.element_size())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor), recorded(linears) as calls:
            out = forward(*args, **kwargs)
        first = out if isinstance(out, Tensor) else out[0]
        first.grad_fn.register_prehook(lambda grads: tally.enter(f"backward.{index}"))  # a tensor's would hold it
        mine = [found for key, found in tally.storages().items() if key not in before]
        about["tuple"] = not isinstance(out, Tensor)
        about["inputs"].append(hidden.numel() * hidden.element_size())
        about["dear"].append(sum(_dear(size, dtype, copies, tally.dtype) for size, dtype, copies in mine))
        about["widened"].append(sum(size - size // copies for size, _, copies in mine if copies > 1))
        groups: dict[int, list[str]] = {}
        for name, number in calls:
            groups.setdefault(number, []).append(name)
        about["groups"].append(list(groups.values()))
        about["parcels"].append(parcels)
        about["heads"].append(tally.heads)
        tally.enter("head")
        return out

    return call


def _dear(size: int, dtype: torch.dtype, copies: int, own: torch.dtype) -> int:
    if copies:
        return size // copies
    wide = dtype.is_floating_point and dtype.itemsize > own.itemsize
    return size * own.itemsize // dtype.itemsize if wide else 0

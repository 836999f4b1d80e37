"""A model under an adapter as numbers that a plan is made of: weights by kind, and what a block keeps, moves and computes
as straight lines over the tokens of a row."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter.attach import install, planned
from veneer.adapter.blocks import repeated_blocks
from veneer.adapter.frozen import is_conv1d
from veneer.adapter.init import Start
from veneer.adapter.targets import Target, input_embedding, output_head
from veneer.base.skeleton import skeleton
from veneer.config import AdapterConfig
from veneer.errors import BaseModelError
from veneer.plan.trace import Rows, Trace, alike, trace

TRACED = 192, 320
"""Tokens of the two rows through which the lines are drawn."""


@dataclass(frozen=True)
class Line:
    """fixed + slope·tokens."""

    fixed: float
    slope: float

    def __call__(self, tokens: float) -> float:
        return self.fixed + self.slope * tokens

    @classmethod
    def through(cls, tokens: tuple[int, int], values: tuple[float, float]) -> Line:
        slope = (values[1] - values[0]) / (tokens[1] - tokens[0])
        return cls(values[0] - slope * tokens[0], slope)


@dataclass(frozen=True)
class Op:
    """FLOPs and bytes moved of one operation, by tokens."""

    flops: Line
    moved: Line


@dataclass(frozen=True)
class Block:
    """One repeated block. Bytes by tokens of a row, over what was there before the block:

    `inputs` its hidden states, `kept` what eager autograd keeps of it, `dear` what of that is dear to compute again,
    `widened` what attention's widened keys and values have besides,
    `forward_peak` and `backward_peak` the most while it runs with all kept. `parcels` are a token's bytes of each tensor
    that eager autograd saves, as often as it does.
    `linears` are the sizes of its frozen matrices that quantisation takes, `other` the rest of its weights in numbers;
    `beside` is what packing adds to them in numbers, and `groups` the sizes of the packed matrices that come of linears
    of one input (`training.packing`); `lows` are a token's bytes of x Aᵀ of each such group, with how many linears it has.
    `heads` is heads times head width of the queries, `window` the tokens that
    attention looks back (None: all).
    """

    inputs: Line
    kept: Line
    dear: Line
    parcels: tuple[float, ...]
    forward_peak: Line
    backward_peak: Line
    forward_ops: tuple[Op, ...]
    backward_ops: tuple[Op, ...]
    linears: tuple[int, ...]
    other: int
    heads: int
    window: int | None
    beside: int = 0
    groups: tuple[int, ...] = ()
    lows: tuple[tuple[int, int], ...] = ()
    widened: Line = Line(0.0, 0.0)

    @property
    def widest(self) -> float:
        """A token's bytes of the widest tensor that is kept."""
        return max(self.parcels, default=0.0)

    @property
    def wide_share(self) -> float:
        """Share of what is kept that is as wide as an MLP's inside."""
        widest = self.widest
        return sum(size for size in self.parcels if size >= 0.99 * widest) / max(1.0, sum(self.parcels))

    @property
    def numbers(self) -> int:
        return sum(self.linears) + self.other


@dataclass(frozen=True)
class Profile:
    """A model under an adapter. `dtype_bytes` is of the base's dtype; numbers are counts, not bytes.

    `movable` are those of the embedding if its table may be in host memory: frozen, and not the head's too.
    `adapter_bytes` is what the adapter holds and `trained_bytes` and `trained` what of it is trained (bytes, numbers).
    `embedding`, `head` and `rest` are the base's numbers outside the blocks (a tied head counts as embedding and has 0).
    `embed_kept`, `head_peak`, `head_end` and `tail_peak` are bytes by tokens: kept before the first block; over all that
    the blocks keep: the most of the final norm, what is there when the loss is made, the most before the last block's
    backward pass. `head_ops` are those of embedding, final norm and their backward.
    """

    name: str
    model_type: str
    dtype_bytes: int
    hidden: int
    vocabulary: int
    blocks: tuple[Block, ...]
    embedding: int
    head: int
    rest: int
    adapter_bytes: int
    trained_bytes: int
    trained: int
    embed_kept: Line
    head_peak: Line
    head_end: Line
    tail_peak: Line
    head_ops: tuple[Op, ...]
    stored: str | None = None
    movable: int = 0

    @property
    def numbers(self) -> int:
        """Of the base."""
        return sum(block.numbers for block in self.blocks) + self.embedding + self.head + self.rest


def profile(
    name: str | Path, adapter: AdapterConfig | None = None, *, dtype: str = "auto", rows: Rows = "equal"
) -> Profile:
    """The profile of a model from its configuration alone; see `skeleton` for what may be named.

    Raises what `skeleton` and `attach` raise, and `BaseModelError` where the step does not run on the meta device.
    """
    return profile_of(skeleton(name, dtype=dtype), adapter or AdapterConfig(), rows, str(name))


def profile_of(model: nn.Module, adapter: AdapterConfig, rows: Rows, name: str = "") -> Profile:
    """The profile of a model on the meta device, which gets the adapter."""
    from veneer.base.skeleton import stored_quantisation

    touched = adapter.trainable_tokens or adapter.new_tokens or adapter.modules_to_save
    adapter = adapter.model_copy(
        update={"adalora": None, "new_tokens": [], "invocation": None, "init": "kaiming", "init_options": {}}
    )
    if output_head(model) is None:
        raise BaseModelError(f"{type(model).__name__} has no output head: plans are for causal language models")
    model.requires_grad_(False)
    outside = _outside(model)
    with torch.device("meta"):
        plan = planned(model, adapter)
    bank = install(plan, [_blank(target) for target in plan.targets], "default")
    blocks, like = repeated_blocks(model), alike(repeated_blocks(model))
    frozen = {i: _frozen(blocks[i]) for i in set(like)}
    traces = [trace(model, tokens, rows=rows) for tokens in TRACED]
    made = {i: _block(at, i, traces, *frozen[i], blocks[i]) for at, i in enumerate(traces[0].index)}
    tensors = list(bank.parameters("default").values())
    trained = [p for p in tensors if p.requires_grad]
    inside = sum(sum(linears) + other for linears, other in (frozen[i] for i in like))
    embedding, head, numbers = outside
    frozen_table = head and not touched and all(target.kind != "embedding" for target in plan.targets)
    return Profile(
        name=name,
        model_type=model.config.model_type,
        dtype_bytes=next(model.parameters()).element_size(),
        hidden=model.config.get_text_config().hidden_size,
        vocabulary=output_head(model).weight.shape[0],
        blocks=tuple(made[i] for i in like),
        embedding=embedding,
        head=head,
        rest=numbers - inside - embedding - head,
        adapter_bytes=sum(p.numel() * p.element_size() for p in tensors),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        trained=sum(p.numel() for p in trained),
        **_ends(traces),
        stored=stored_quantisation(model.config),
        movable=embedding if frozen_table else 0,
    )


def _blank(target: Target) -> Start:
    lora_A, lora_B = (torch.empty(shape, device="meta") for shape in target.layer().factor_shapes(target.rank))
    return Start(lora_A, lora_B, changes_base=False)


def _outside(model: nn.Module) -> tuple[int, int, int]:
    """Numbers of the input embedding, of an output head that is not tied to it, and of the whole model."""
    embedding, head = input_embedding(model), output_head(model)
    own = 0 if embedding is None else embedding.weight.numel()
    tied = head is None or (embedding is not None and head.weight is embedding.weight)
    every = {id(p): p for p in [*model.parameters(), *model.buffers()]}.values()
    return own, 0 if tied else head.weight.numel(), sum(p.numel() for p in every)


def _frozen(block: nn.Module) -> tuple[tuple[int, ...], int]:
    """Sizes of the block's matrices that quantisation takes, and how many other numbers it has, without the adapter's."""
    linears = [prod(m.weight.shape) for m in block.modules() if type(m) is nn.Linear or is_conv1d(m)]
    own = sum(p.numel() for name, p in block.named_parameters() if "lora_" not in name)
    return tuple(linears), own - sum(linears)


def _window(block: nn.Module) -> int | None:
    found = [getattr(m, "sliding_window", None) for m in block.modules()]
    return next((w for w in found if isinstance(w, int)), None)


def _line(traces: list[Trace], value: Any) -> Line:
    return Line.through((traces[0].tokens, traces[1].tokens), (value(traces[0]), value(traces[1])))


def _ops(traces: list[Trace], *phases: str) -> tuple[Op, ...]:
    """The operations of some phases, those that only a part of them has at the end of each left out."""
    tokens, made = (traces[0].tokens, traces[1].tokens), []
    for phase in phases:
        pairs = zip(traces[0].phases[phase].ops, traces[1].phases[phase].ops)
        made += [Op(Line.through(tokens, (a[1], b[1])), Line.through(tokens, (a[2], b[2]))) for a, b in pairs]
    return tuple(made)


def _block(at: int, index: int, traces: list[Trace], linears: tuple[int, ...], other: int, block: nn.Module) -> Block:
    beside, groups, lows = _packed(block, traces[0].groups[at])
    forward, backward = f"forward.{index}", f"backward.{index}"

    def kept(t: Trace) -> float:
        after = f"forward.{t.index[at + 1]}" if at + 1 < len(t.index) else "head"
        return t.phases[after].start - t.phases[forward].start - (t.inputs[at] if after == "head" else 0)

    return Block(
        inputs=_line(traces, lambda t: t.inputs[at]),
        kept=_line(traces, kept),
        dear=_line(traces, lambda t: t.dear[at]),
        parcels=tuple(size / traces[1].tokens for size in traces[1].parcels[at]),
        forward_peak=_line(traces, lambda t: t.phases[forward].peak - t.phases[forward].start),
        backward_peak=_line(traces, lambda t: t.phases[backward].peak - t.phases[forward].start),
        forward_ops=_ops(traces, forward),
        backward_ops=_ops(traces, backward),
        linears=linears,
        other=other,
        heads=traces[0].heads[at],
        window=_window(block),
        beside=beside,
        groups=groups,
        lows=lows,
        widened=_line(traces, lambda t: t.widened[at]),
    )


def _packed(block: nn.Module, groups: list[list[str]]) -> tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]]:
    """What the matrices of `kernels.group` have besides the weights, how large each is, in numbers, and `Block.lows`."""
    beside, sizes, lows = 0, [], []
    for names in groups:
        layers = [block.get_submodule(name) for name in names]
        rows, ranks = sum(layer.d_out for layer in layers), sum(layer.rank["default"] for layer in layers)
        width = layers[0].d_in
        sizes.append((rows + ranks) * (width + ranks))
        beside += sizes[-1] - rows * width
        lows.append((ranks * layers[0].place()[1].itemsize, len(layers)))
    return beside, tuple(sizes), tuple(lows)


def _ends(traces: list[Trace]) -> dict[str, Any]:
    def over(phase: str, what: str) -> Line:
        """Over what the last block left, its own input not counted."""
        return _line(traces, lambda t: getattr(t.phases[phase], what) - t.phases["head"].start + t.inputs[-1])

    return {
        "embed_kept": _line(traces, lambda t: t.phases[f"forward.{t.index[0]}"].start),
        "head_peak": over("head", "peak"),
        "head_end": over("head", "end"),
        "tail_peak": over("tail", "peak"),
        "head_ops": _ops(traces, "embed", "head", "tail"),
    }

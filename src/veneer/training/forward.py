"""One packed row through the model: hidden states, then the loss where there is a label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from veneer.adapter.attach import BANK
from veneer.adapter.targets import output_head
from veneer.data.example import TokenizedExample
from veneer.data.pack import Row, pack
from veneer.errors import BaseModelError
from veneer.kernels import dispatch
from veneer.kernels.attention import Layout, has_varlen, layout_attention, packed_attention
from veneer.kernels.cross_entropy import CHUNK_BYTES
from veneer.kernels.devices import indexed, sent
from veneer.training.lower import Start

ATTENTION = "veneer_packed"
# The segments of the row now in work. One slot for the process, not a context variable: with checkpointing, blocks are
# recomputed in autograd's own thread for the GPU, which sees no context of ours.
_current: dict[str, list[tuple[int, int, int, int]]] = {}


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **extra):
    """`packed_attention` behind transformers' attention interface."""
    if extra.get("softcap") is not None or extra.get("s_aux") is not None:
        raise BaseModelError(
            "this model's attention has soft-caps or sinks, which packed rows do not have; use pack: off"
        )
    layout = extra.get("veneer_layout")
    if layout is not None and not dropout:
        return layout_attention(query, key, value, layout, scale=scaling, window=sliding_window), None
    out = packed_attention(
        query, key, value, _current["segments"], scale=scaling, window=sliding_window, dropout=dropout
    )
    return out, None


AttentionInterface.register(ATTENTION, _attention)


@dataclass(frozen=True)
class Head:
    """How the model turns hidden states into logits, besides its output matrix."""

    softcap: float | None
    scale: float

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """Read Gemma's soft-cap, Cohere's logit_scale (a factor) and Granite's logits_scaling (a divisor)."""
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        return cls(
            getattr(config, "final_logit_softcapping", None), scale / (getattr(config, "logits_scaling", None) or 1.0)
        )


def segments_of(row: Row) -> list[tuple[int, int, int, int]]:
    """A row's segments as (start, end, prefix_start, prefix_end)."""
    return [(s.start, s.end, s.prefix_start, s.prefix_end) for s in row.segments]


class RowModel:
    """A causal language model as a function of packed rows.

    `packing` and `fast_head` start as asked for and `check` turns them off, with the reason, where the model does not
    give the same answer with them.
    """

    def __init__(
        self, model: nn.Module, *, packing: bool = True, place: tuple[torch.device, torch.dtype] | None = None
    ) -> None:
        """`place` is where the model computes and in which dtype; absent: as its first parameter."""
        if output_head(model) is None:
            raise BaseModelError(f"{type(model).__name__} has no output head: Veneer trains causal language models")
        self.model, self.head = model, Head.of(model)
        weight = next(model.parameters())
        device, self.dtype = place or (weight.device, weight.dtype)
        self.device = indexed(device)
        self.packing = packing and bool(getattr(model, "_supports_attention_backend", False))
        self.fast_head = True
        self.varlen = self.device.type == "cuda" and self.dtype in (torch.float16, torch.bfloat16) and has_varlen()
        self.notes: list[str] = []
        bank = model.__dict__.get(BANK)
        if self.packing and bank is not None and bank.routing.tokens:
            self.packing = False
            self.notes.append("packing is off: where an activated adapter (aLoRA) acts is found by whole rows")
        elif packing and not self.packing:
            self.notes.append(f"packing is off: {type(model).__name__} does not take a custom attention")

    def loss(self, row: Row) -> Tensor:
        """Summed cross-entropy over the row's targets, a float32 scalar."""
        return self.row_losses(row, "sum")

    def row_losses(self, row: Row, reduction: str = "none", start: Start | None = None) -> Tensor:
        """Cross-entropy at each of the row's N targets, (N) float32; with reduction "sum" their sum.

        `start`: read these tokens in the row's place, which the model is made to turn into the row's on the way.
        """
        return self.tensor_loss(*self.inputs(row, start), len(row.segments) > 1, reduction)

    def inputs(self, row: Row, start: Start | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Layout | None]:
        """A row on the device: token ids, positions, predictors, targets, and its layout where attention takes one."""
        read = row if start is None else start.row
        parts = (read.input_ids, read.position_ids, row.predictors, row.targets)
        layout = Layout.of(segments_of(read), self.device) if self.packing and self.varlen else None
        return *(sent(torch.from_numpy(part), self.device) for part in parts), layout

    def tensor_loss(
        self,
        ids: Tensor,
        positions: Tensor,
        predictors: Tensor,
        targets: Tensor,
        layout: Layout | None,
        packed: bool,
        reduction: str = "sum",
    ) -> Tensor:
        """`losses` of a row's tensors. Targets below 0 count for nothing."""
        inputs = {"input_ids": ids[None], "use_cache": False}
        if packed:
            inputs["position_ids"] = positions[None]
        if layout is not None:
            inputs["veneer_layout"] = layout
        if not self.fast_head:
            logits = self.model(**inputs).logits[0, predictors].float()
            return F.cross_entropy(logits, targets, reduction=reduction)
        hidden = self.model.base_model(**inputs).last_hidden_state[0].index_select(0, predictors)
        return self._head_loss(hidden, targets, reduction)

    def _head_loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        head = output_head(self.model)
        if type(head) is nn.Linear and not head.weight.requires_grad:
            options = {"softcap": self.head.softcap, "logit_scale": self.head.scale, "reduction": reduction}
            return dispatch.linear_cross_entropy(hidden, head.weight, head.bias, targets, **options)
        rows = max(1, CHUNK_BYTES // (4 * head.out_features))
        parts = zip(hidden.split(rows), targets.split(rows))
        losses = [checkpoint(self._plain_loss, head, h, t, reduction, use_reentrant=False) for h, t in parts]
        return sum(losses) if reduction == "sum" else torch.cat(losses)

    def _plain_loss(self, head: nn.Module, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits = head(hidden).float() * self.head.scale
        if self.head.softcap is not None:
            logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
        return F.cross_entropy(logits, targets, reduction=reduction)

    @contextmanager
    def in_force(self, row: Row) -> Iterator[None]:
        """The row's segments for whatever attention runs inside the block."""
        _current["segments"] = segments_of(row)
        try:
            yield
        finally:
            _current.clear()

    @contextmanager
    def row(self, row: Row, reduction: str = "sum", start: Start | None = None) -> Iterator[Tensor]:
        """The row's loss (or losses), its segments in force for the forward pass and a backward inside the block.

        `start`: the tokens that the row has in several copies, for blocks in which they are the same.
        """
        with self.in_force(row if start is None else start.row):
            if start is None:
                yield self.row_losses(row, reduction)
            else:
                whole = segments_of(row)
                layout = Layout.of(whole, self.device) if self.varlen else None
                with start.spreading(_current["segments"], whole, layout):
                    losses = self.row_losses(row, reduction, start)
                yield losses

    def losses(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """The loss of each row, without gradients."""
        for row in rows:
            with torch.no_grad(), self.row(row) as loss:
                yield loss

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Packed attention for the length of a block, where packing is on; the model's own is put back."""
        own = getattr(self.model.config, "_attn_implementation", None)
        if self.packing:
            self.model.set_attn_implementation(ATTENTION)
        try:
            yield
        finally:
            if self.packing:
                self.model.set_attn_implementation(own)

    def pack(self, examples: Sequence[TokenizedExample], max_tokens: int, share_prefix: bool) -> list[Row]:
        """Examples as rows, packed or one by one."""
        return pack(examples, max_tokens, packing=self.packing, share_prefix=share_prefix)

    def check(self, examples: Sequence[TokenizedExample], required: bool = False) -> None:
        """Compare the fast head and the packed rows with the model's own plain answer on a few short examples.

        A difference turns the feature off and leaves a note; with `required` packing it is a `BaseModelError`.
        """
        few = _short(examples)
        if not few:
            return
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            plain = float(sum(_plain(self.model, example, self.device) for example in few))
            if self._differs(plain, pack(few, 1, packing=False)):
                self.fast_head = False
                self.notes.append("the model's logits are not its head times its hidden states: full logits are made")
            if self.packing:
                with self.attention():
                    try:
                        wrong = self._differs(plain, self.pack(few, 1 << 30, True))
                    except (TypeError, ValueError, RuntimeError) as error:
                        wrong = str(error).splitlines()[0]
                if wrong:
                    self._refuse_packing(wrong, required)
        self.model.train(training)

    def _refuse_packing(self, wrong: bool | str, required: bool) -> None:
        reason = "packed rows give another loss than single ones" if wrong is True else wrong
        if required:
            raise BaseModelError(
                f"pack: on, but {type(self.model).__name__} cannot be packed: {reason}; use pack: auto"
            )
        self.packing = False
        self.notes.append(f"packing is off: {reason}")

    def _differs(self, plain: float, rows: Sequence[Row]) -> bool:
        total = float(sum(self.losses(rows)))
        tolerance = 1e-3 if self.dtype == torch.float32 else 3e-2
        return not abs(total - plain) <= tolerance * max(1.0, abs(plain))


def _plain(model: nn.Module, example: TokenizedExample, device: torch.device) -> Tensor:
    ids = torch.from_numpy(example.input_ids.astype(np.int64)).to(device)
    where = torch.from_numpy(np.flatnonzero(example.supervised[1:])).to(device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[where].float(), ids[where + 1], reduction="sum")


def _short(examples: Sequence[TokenizedExample], count: int = 3, tokens: int = 64) -> list[TokenizedExample]:
    """A few short pieces that hold supervised tokens, two of them with a common start."""
    few = []
    for example in examples:
        first = int(np.flatnonzero(example.supervised)[0]) if example.supervised.any() else None
        if first is None:
            continue
        start = max(0, first - tokens // 2)
        piece = slice(start, start + tokens)
        few.append(TokenizedExample(example.input_ids[piece], example.supervised[piece]))
        if len(few) == count:
            break
    if few and len(few[0].input_ids) > 16:
        first = few[0]
        changed = first.input_ids.copy()
        changed[-1] = changed[0]
        few.append(TokenizedExample(changed, first.supervised))
    return few

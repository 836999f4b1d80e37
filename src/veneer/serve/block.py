"""Decoder blocks of known models, served with few launches: `kernels.served_block` between the base's own products.

A block of Llama's kind is x += o(attention(q, k, v of norm(x))), x += down(silu(gate) · up of norm(x)). What a block adds
last is added as the next one begins, where it is normed, so blocks hand on y: `Flow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.kernels import served_block
from veneer.kernels.served import Table
from veneer.kernels.served_block_twins import Update
from veneer.serve.packed import is_plain
from veneer.serve.pool import Group, Pool, Stack

KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Blocks of transformers that are exactly this: pre-norms, rotation of whole heads, no other scale or norm."""
PARTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
WIDEST = 16384
"""Numbers of a row that one program norms."""


class Products:
    """Linears of the base that read one input, and the adapters' factors for them, if the pool has any.

    Plain ones are one product once they are joined.
    """

    def __init__(self, layers: Sequence[nn.Module], group: Group, pool: Pool) -> None:
        self.layers, self.group, self.pool = layers, group, pool
        self.weight = self.bias = None

    def join(self) -> None:
        """Make the weights of plain linears parts of one matrix, which costs no memory that stays."""
        biases = [layer.bias for layer in self.layers if is_plain(layer)]
        if not len(biases) == len(self.layers) > 1:
            return
        if len({bias is None for bias in biases}) == len({layer.weight.dtype for layer in self.layers}) == 1:
            self.weight = torch.cat([layer.weight.detach() for layer in self.layers])
            self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
            for layer, part in zip(self.layers, self.weight.split(self.widths)):
                layer.weight.data = part

    @property
    def widths(self) -> list[int]:
        """Outputs of each linear."""
        return [layer.out_features for layer in self.layers]

    def stack(self, adapters: bool) -> Stack | None:
        """The group's factors, unless the pass has no adapters."""
        return self.pool.stacks.get(self.group) if adapters else None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Each linear's outputs of x (B, D)."""
        if self.weight is None:
            return [layer(x) for layer in self.layers]
        return F.linear(x, self.weight, self.bias).split(self.widths, 1)

    def part(self) -> None:
        """Give every linear a weight of its own again."""
        if self.weight is not None:
            for layer in self.layers:
                layer.weight.data = layer.weight.data.clone()
            self.weight = self.bias = None


@dataclass
class Flow:
    """What blocks hand on in a pass: its table, and what is still to be added to x, y (B, D) of the last product and its
    update."""

    table: Table | None = None
    y: Tensor | None = None
    update: Update | None = None

    def into(self, x: Tensor, norm: nn.Module, stack: Stack | None) -> tuple[Tensor, Update | None]:
        """x (B, D) += y and its update, in place; → norm(x), and the update of the products of `stack` that read it."""
        y, update = self.y, self.update
        self.y = self.update = None
        eps = norm.variance_epsilon
        if update is None and stack is None:
            return served_block.norm(x, y, norm.weight, eps)[0], None
        parts = served_block.add(x, y, update, self.table, norm.weight, stack and stack.A)
        normed, hidden = served_block.norm(x, None, norm.weight, eps, parts)
        return normed, update_of(hidden, stack)


def update_of(hidden: Tensor | None, stack: Stack | None) -> Update | None:
    """The update that h (N, B, W) makes with a stack's B."""
    return None if stack is None else Update(hidden, stack.B)


class ServedBlock(nn.Module):
    """A decoder block that takes passes in which a row has one adapter or none; the model's own takes the others."""

    def __init__(self, layer: nn.Module, products: Sequence[Products], flow: Flow) -> None:
        super().__init__()
        self.layer = layer
        self.__dict__["products"], self.__dict__["flow"] = products, flow
        attention = layer.self_attn
        self.index, self.scale, self.window = attention.layer_idx, attention.scaling, window_of(layer)
        norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_norms = None if norms[0] is None else [norm.weight for norm in norms]
        self.head_eps = 0.0 if norms[0] is None else norms[0].variance_epsilon

    def __getattr__(self, name: str) -> Any:
        """What a model asks its blocks for, such as Qwen's `attention_type` in transformers 5.0."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)

    def forward(self, x: Tensor, *, position_embeddings=None, veneer_batch=None, **options) -> Tensor:
        if self.index == 0:  # whatever a pass that failed has left
            self.flow.y = self.flow.update = None
        if veneer_batch is None or not veneer_batch.fused:
            return self.layer(x, position_embeddings=position_embeddings, veneer_batch=veneer_batch, **options)
        self.flow.table = veneer_batch.table
        rows, turn = x.view(-1, x.shape[-1]), tuple(t.reshape(-1, t.shape[-1]) for t in position_embeddings)
        self._attention(rows, turn, veneer_batch)
        self._mlp(rows, veneer_batch)
        return x

    def join(self) -> None:
        """Make one product of those that read one input; `unpack` undoes it."""
        for products in self.products:
            products.join()

    def unpack(self) -> nn.Module:
        """The model's own block, as it was."""
        for products in self.products:
            products.part()
        return self.layer

    def _attention(self, x: Tensor, turn: tuple[Tensor, Tensor], batch: Any) -> None:
        (qkv, o, *_), table = self.products, self.flow.table
        normed, update = self.flow.into(x, self.layer.input_layernorm, qkv.stack(batch.room > 0))
        place = batch.slots, batch.positions, *batch.cache.store[self.index]
        q = served_block.rotate(qkv(normed), update, table, self.head_norms, self.head_eps, turn, *place)
        stack = o.stack(batch.room > 0)
        heads, parts = batch.attend_heads(self.index, q, self.scale, self.window, stack and stack.A)
        (self.flow.y,), self.flow.update = o(heads), update_of(parts, stack)

    def _mlp(self, x: Tensor, batch: Any) -> None:
        (*_, gated, down), table = self.products, self.flow.table
        normed, update = self.flow.into(x, self.layer.post_attention_layernorm, gated.stack(batch.room > 0))
        stack = down.stack(batch.room > 0)
        inner, parts = served_block.gated(*gated(normed), update, table, stack and stack.A)
        (self.flow.y,), self.flow.update = down(inner), update_of(parts, stack)


def window_of(layer: nn.Module) -> int | None:
    """How many keys a row sees, None for all: of the config only Mistral's attention asks it."""
    asked = layer.self_attn.config if type(layer).__name__ == "MistralDecoderLayer" else layer.self_attn
    return getattr(asked, "sliding_window", None)


class ServedNorm(nn.Module):
    """The model's last norm, which adds what the last block left to be added."""

    def __init__(self, norm: nn.Module, flow: Flow) -> None:
        super().__init__()
        self.norm = norm
        self.__dict__["flow"] = flow

    def forward(self, x: Tensor) -> Tensor:
        if self.flow.y is None:
            return self.norm(x)
        return self.flow.into(x.view(-1, x.shape[-1]), self.norm, None)[0].view_as(x)


def known(model: nn.Module) -> bool:
    """Whether a model is of blocks that can be served with few launches, and a last norm."""
    inner, config = model.base_model, model.config.get_text_config()
    layers = list(getattr(inner, "layers", ()))
    fits = getattr(config, "hidden_act", None) == "silu" and config.hidden_size <= WIDEST
    fits = fits and hasattr(inner, "norm") and bool(layers)
    kinds = {type(layer) for layer in layers}
    fits = fits and all(k.__name__ in KNOWN and k.__module__.startswith("transformers.models.") for k in kinds)
    return fits and all(layer.self_attn.head_dim % 2 == 0 for layer in layers)


def served_blocks(model: nn.Module, pool: Pool) -> dict[str, nn.Module]:
    """What takes the place of a known model's blocks and last norm, by name; nothing for another model."""
    groups = {group.targets: group for group in pool.groups}
    names = {module: name for name, module in model.named_modules()}
    layers = list(model.base_model.layers) if known(model) else []
    parts = {layer: [tuple(f"{names[layer]}.{leaf}" for leaf in leaves) for leaves in PARTS] for layer in layers}
    if not layers or not groups.keys() >= {part for own in parts.values() for part in own}:
        return {}
    flow, found = Flow(), {}
    for layer, own in parts.items():
        linears = [[model.get_submodule(name) for name in part] for part in own]
        products = [Products(layers, groups[part], pool) for layers, part in zip(linears, own)]
        found[names[layer]] = ServedBlock(layer, products, flow)
    norm = model.base_model.norm
    return found | {names[norm]: ServedNorm(norm, flow)}

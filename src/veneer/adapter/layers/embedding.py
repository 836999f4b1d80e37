"""Adapted embeddings, and the output head that shares their weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import math
from veneer.adapter.frozen import row_square_norms
from veneer.adapter.layers.base import AdaptedModule, Options, clone_module
from veneer.errors import AdapterStateError


def adaptable(embedding: nn.Embedding) -> str | None:
    """Why an embedding cannot be adapted; None if it can."""
    scaled = hasattr(embedding, "embed_scale")
    if type(embedding).forward is not nn.Embedding.forward and not scaled:
        return f"{type(embedding).__name__} does more than a look-up"
    return "its max_norm rewrites the weight on each call" if embedding.max_norm is not None else None


class AdaptedEmbedding(AdaptedModule):
    """y = e·(E[x] + Σ_n w_n s_n B_n A_n[:, x]), where e is the scale that some models' embeddings have.

    lora_A[n] is (rank, vocabulary), lora_B[n] (dimension, rank): ΔE = s (B A)ᵀ. With DoRA, c∘(E[x] + s B A[:, x]) with
    c = m/‖Eᵀ + s B A‖ per dimension, as PEFT has it.
    """

    kind = "embedding"

    @property
    def d_in(self) -> int:
        return self.base_layer.num_embeddings

    @property
    def d_out(self) -> int:
        return self.base_layer.embedding_dim

    def supports(self, option: str) -> bool:
        return option == "dora"

    def forward(self, ids: Tensor) -> Tensor:
        y = self.base_layer(ids)
        if self.routing.ranges is not None:
            return self._by_range(ids, y, self._update, -1)
        if self.routing.rows is not None:
            return self._routed(ids, y, self.routing.rows)
        for name, weight in self.active():
            y = y + weight * self._update(name, ids, y)
        return y

    def _update(self, name: str, ids: Tensor, y: Tensor) -> Tensor:
        base = self.base_layer
        lora_A, lora_B = self.factors(name)
        low = F.embedding(ids, lora_A.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        update = (self.scaling[name] * F.linear(low, lora_B)).to(y.dtype) * self.scale(y)
        if name not in self.lora_magnitude_vector:
            return update
        c = (self.lora_magnitude_vector[name] / self._norm(name)).to(y.dtype)
        return (c - 1) * self.base_layer(ids) + c * update

    def scale(self, y: Tensor) -> Tensor | float:
        """The factor that the base's own forward applies to its rows."""
        scale = getattr(self.base_layer, "embed_scale", 1.0)
        return scale.to(y) if isinstance(scale, Tensor) else scale

    def _routed(self, ids: Tensor, y: Tensor, rows: tuple[str | None, ...]) -> Tensor:
        if ids.shape[0] != len(rows):
            raise AdapterStateError(f"routing names {len(rows)} rows but the batch has {ids.shape[0]}")
        out = y
        for name in [n for n in dict.fromkeys(rows) if n in self.lora_A]:
            mine = torch.tensor([i for i, row in enumerate(rows) if row == name], device=ids.device)
            out = out.index_add(0, mine, self._update(name, ids[mine], y[mine]))
        return out

    def _norm(self, name: str) -> Tensor:
        """‖Eᵀ + s B A‖ of each dimension, (dimension) float32, without gradient."""
        with torch.no_grad():
            weight = self.base_layer.weight.t()
            return math.dora_norm(weight, row_square_norms(weight), *self.factors(name), self.scaling[name])

    def start_magnitude(self, name: str) -> Tensor:
        return self._norm(name).to(self.lora_A[name].dtype)

    def delta(self, name: str) -> Tensor:
        """ΔE of one adapter in float32, (vocabulary, dimension)."""
        change = math.delta(*self.factors(name), self.scaling[name]).t()
        if name not in self.lora_magnitude_vector:
            return change
        weight = math.wide(self.base_layer.weight)
        total = weight + change
        return total * (math.wide(self.lora_magnitude_vector[name]) / torch.linalg.vector_norm(total, dim=0)) - weight

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        with torch.no_grad():
            weight = self.base_layer.weight
            total = math.wide(weight) + sum(w * self.delta(n) for n, w in self._mine(weights))
            return clone_module(self.base_layer, weight=total.to(weight.dtype))


class TiedHead(AdaptedModule):
    """The output head of an adapted embedding that shares its weight: z = h Eᵀ + Σ_n w_n s_n (h B_n) A_n.

    It has no factors of its own; the embedding's act for those adapters whose `tied_head` is "both".
    """

    kind = "tied"

    def __init__(self, base_layer: nn.Linear, source: AdaptedEmbedding) -> None:
        super().__init__(base_layer, source.routing)
        self.__dict__["source"] = source  # not a submodule: its factors are the embedding's
        self.names: set[str] = set()

    def active(self) -> list[tuple[str, float]]:
        return [(name, weight) for name, weight in self.routing.stack.items() if name in self.names]

    def forward(self, h: Tensor) -> Tensor:
        z = self.base_layer(h)
        if self.routing.rows is not None:
            return self._routed(h, z, self.routing.rows)
        return z + sum(w * self._update(name, h) for name, w in self.active()) if self.active() else z

    def _update(self, name: str, h: Tensor) -> Tensor:
        lora_A, lora_B = (f.to(h.dtype) for f in self.source.factors(name))
        return self.source.scaling[name] * ((h @ lora_B) @ lora_A)

    def _routed(self, h: Tensor, z: Tensor, rows: tuple[str | None, ...]) -> Tensor:
        for name in [n for n in dict.fromkeys(rows) if n in self.names]:
            mine = torch.tensor([i for i, row in enumerate(rows) if row == name], device=h.device)
            z = z.index_add(0, mine, self._update(name, h[mine]).to(z.dtype))
        return z

    def remove(self, name: str) -> None:
        self.names.discard(name)

    def rename(self, name: str, new: str) -> None:
        if name in self.names:
            self.names.discard(name), self.names.add(new)

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        mine = {n: w for n, w in weights.items() if n in self.names}
        if mine == {n: w for n, w in weights.items() if n in self.source.lora_A}:
            return clone_module(self.base_layer, weight=self.source.merged(weights).weight.data)
        with torch.no_grad():  # adapters of both kinds: the head has its own sum
            weight = self.base_layer.weight
            total = math.wide(weight) + sum(w * self.source.delta(n) for n, w in mine.items())
            return clone_module(self.base_layer, weight=total.to(weight.dtype))


__all__ = ["AdaptedEmbedding", "Options", "TiedHead", "adaptable"]

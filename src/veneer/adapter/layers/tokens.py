"""Trainable tokens: a few rows of a frozen embedding or output head are trained in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter.layers.base import AdaptedModule, Routing, clone_module, plain
from veneer.errors import AdapterStateError


class TrainedTokens(AdaptedModule):
    """An embedding or an output head of which a few rows are trained: R in place of W's rows at the trained token ids.

    lora_rows[n] is R (tokens, dimension): the rows themselves, not their change, as PEFT stores them, so that rows of
    newly added tokens do not depend on what they held before. Embedding: y[t] = e·R[k] where ids[t] is the k-th trained
    token, else base(ids)[t], with e as in `AdaptedEmbedding`. Head: z[…, id] = h·R[k] + bias[id] for those ids.
    """

    kind = "tokens"

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__(base_layer, routing)
        self.lora_rows = nn.ParameterDict()
        self.indices: dict[str, list[int]] = {}

    def add_rows(self, name: str, indices: Sequence[int], dtype: torch.dtype) -> None:
        """Train the rows of these token ids, from the base's own rows on."""
        at = torch.tensor(indices, device=self.base_layer.weight.device)
        self.lora_rows[name] = nn.Parameter(self.base_layer.weight.detach()[at].to(dtype, copy=True))
        self.indices[name] = list(indices)

    def remove(self, name: str) -> None:
        if name in self.lora_rows:
            del self.lora_rows[name], self.indices[name]

    def rename(self, name: str, new: str) -> None:
        if name in self.lora_rows:
            self.lora_rows[new], self.indices[new] = self.lora_rows.pop(name), self.indices.pop(name)

    def trained(self, name: str) -> dict[str, nn.Parameter]:
        return {"trainable_tokens": self.lora_rows[name]} if name in self.lora_rows else {}

    def active(self) -> list[tuple[str, float]]:
        if self.routing.rows is not None and any(row in self.lora_rows for row in self.routing.rows):
            raise AdapterStateError("adapters with trainable tokens cannot be routed by row")
        active = [(name, weight) for name, weight in self.routing.stack.items() if name in self.lora_rows]
        if any(weight != 1.0 for _, weight in active):
            raise AdapterStateError("an adapter with trainable tokens acts with weight 1 only")
        taken = [i for name, _ in active for i in self.indices[name]]
        if len(set(taken)) != len(taken):
            raise AdapterStateError("two active adapters train the same tokens: activate one of them")
        return active

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(plain(self.base_layer), nn.Embedding):
            return self.look_up(x, self.base_layer)
        return self.replace_logits(x, self.base_layer(x), self.base_layer.bias)

    def look_up(self, ids: Tensor, base: nn.Module) -> Tensor:
        """`base`'s rows of the ids, but for the trained ones."""
        y = base(ids)
        for name, _ in self.active():
            hit = ids.unsqueeze(-1) == torch.tensor(self.indices[name], device=ids.device)
            rows = (self.lora_rows[name] * getattr(base, "embed_scale", 1.0)).to(y.dtype)
            y = torch.where(hit.any(-1, keepdim=True), rows[hit.int().argmax(-1)], y)
        return y

    def replace_logits(self, h: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
        """Logits z (…, vocabulary) of hidden states h (…, dimension) with the trained tokens' own in place."""
        for name, _ in self.active():
            at = torch.tensor(self.indices[name], device=h.device)
            z = z.index_copy(-1, at, F.linear(h, self.lora_rows[name].to(h.dtype), None if bias is None else bias[at]))
        return z

    def replaced(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """A copy of a weight (vocabulary, dimension) with the trained rows in place."""
        out = weight.detach().clone()
        for name in names:
            out[torch.tensor(self.indices[name], device=out.device)] = self.lora_rows[name].detach().to(out.dtype)
        return out

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        names, base = [name for name in weights if name in self.lora_rows], self.base_layer
        base = base.merged(weights) if isinstance(base, AdaptedModule) else base
        return clone_module(base, weight=self.replaced(base.weight, names))


class TrainedTokensTwin(AdaptedModule):
    """A module that shares the weight of an embedding with trained tokens, and so their rows: here another embedding, as
    T5's encoder and decoder have beside the shared one."""

    kind = "tied"

    def __init__(self, base_layer: nn.Module, source: TrainedTokens) -> None:
        super().__init__(base_layer, source.routing)
        self.__dict__["source"] = source  # not a submodule: the rows are the embedding's

    def forward(self, ids: Tensor) -> Tensor:
        return self.source.look_up(ids, self.base_layer)

    def active(self) -> list[tuple[str, float]]:
        return self.source.active()

    def remove(self, name: str) -> None:
        """The rows are the embedding's."""

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        return clone_module(self.base_layer, weight=self.source.merged(weights).weight.data)


class TrainedTokensHead(TrainedTokensTwin):
    """The output head that shares the weight of an embedding with trained tokens, and so their rows."""

    def forward(self, h: Tensor) -> Tensor:
        return self.source.replace_logits(h, self.base_layer(h), self.base_layer.bias)

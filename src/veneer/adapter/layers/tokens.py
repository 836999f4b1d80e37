"""Trainable tokens: a few rows of a frozen embedding (and of the head that shares it) are trained in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from veneer.adapter.layers.base import AdaptedModule, Routing, clone_module
from veneer.errors import AdapterStateError


class TrainedTokens(AdaptedModule):
    """y[t] = e·R[k] where ids[t] is the k-th trained token, else base(ids)[t]; e as in `AdaptedEmbedding`.

    lora_rows[n] is R (tokens, dimension): the rows themselves, not their change, as PEFT stores them, so that rows of newly
    added tokens do not depend on what they held before.
    """

    kind = "tokens"

    def __init__(self, base_layer: nn.Embedding, routing: Routing) -> None:
        super().__init__(base_layer, routing)
        self.lora_rows = nn.ParameterDict()
        self.indices: dict[str, list[int]] = {}

    def add_rows(self, name: str, indices: Sequence[int], rows: Tensor | None, dtype: torch.dtype) -> None:
        """Train the rows of these token ids, from the base's own rows or from `rows` (tokens, dimension)."""
        at = torch.tensor(indices, device=self.base_layer.weight.device)
        start = self.base_layer.weight[at] if rows is None else rows
        self.lora_rows[name] = nn.Parameter(start.detach().to(at.device, dtype, copy=True))
        self.indices[name] = list(indices)

    def remove(self, name: str) -> None:
        if name in self.lora_rows:
            del self.lora_rows[name], self.indices[name]

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

    def forward(self, ids: Tensor) -> Tensor:
        return self.look_up(ids, self.base_layer)

    def look_up(self, ids: Tensor, base: nn.Module) -> Tensor:
        """`base`'s rows of the ids, but for the trained ones."""
        y = base(ids)
        for name, _ in self.active():
            at = torch.tensor(self.indices[name], device=ids.device)
            hit = ids.unsqueeze(-1) == at
            rows = (self.lora_rows[name] * getattr(base, "embed_scale", 1.0)).to(y.dtype)
            y = torch.where(hit.any(-1, keepdim=True), rows[hit.int().argmax(-1)], y)
        return y

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
    """A module that shares the weight of an embedding with trained tokens: here another embedding, as T5's encoder and
    decoder have beside the shared one."""

    kind = "tied"

    def __init__(self, base_layer: nn.Module, source: TrainedTokens) -> None:
        super().__init__(base_layer, source.routing)
        self.__dict__["source"] = source  # not a submodule: the rows are the embedding's

    def forward(self, ids: Tensor) -> Tensor:
        return self.source.look_up(ids, self.base_layer)

    def remove(self, name: str) -> None:
        """The rows are the embedding's."""

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        return clone_module(self.base_layer, weight=self.source.merged(weights).weight.data)


class TrainedTokensHead(TrainedTokensTwin):
    """The output head that shares the weight of an embedding with trained tokens: z[…, id] = h·R[k] for those ids."""

    def forward(self, h: Tensor) -> Tensor:
        z, source = self.base_layer(h), self.source
        for name, _ in source.active():
            at = torch.tensor(source.indices[name], device=h.device)
            logits = nn.functional.linear(h, source.lora_rows[name].to(h.dtype))
            if self.base_layer.bias is not None:
                logits = logits + self.base_layer.bias[at]
            z = z.index_copy(-1, at, logits)
        return z

"""An input embedding whose table stays in host memory: a step looks up a few thousand of its rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.adapter.layers import AdaptedModule
from veneer.adapter.targets import input_embedding, output_head
from veneer.base.held import host_buffer
from veneer.errors import ConfigError
from veneer.kernels.host_rows import host_rows

PURPOSE = "the input embedding: use train.embedding: device"


def embedded(embedding: nn.Embedding, rows: Tensor, where: Tensor) -> Tensor:
    """The embedding's own forward pass with `rows` (n, d) for its table: (…, d) of the rows that `where` (…) names."""
    table, padding = embedding.weight.data, embedding.padding_idx
    embedding.weight.data, embedding.padding_idx = rows, None
    try:
        return type(embedding).forward(embedding, where)
    finally:
        embedding.weight.data, embedding.padding_idx = table, padding


class HostEmbedding(nn.Module):
    """Stands in for a frozen embedding, whose table it holds in host memory (pinned beside a GPU) and not as a parameter.

    What the embedding does beside the lookup (a scale, say) is its own forward's work, on the rows that were looked up.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        table = embedding.weight.data
        flat = host_buffer(table.numel() * table.element_size(), table.device, PURPOSE)
        self.table = flat.view(table.dtype).view(table.shape)
        self.table.copy_(table)
        embedding.weight.data = table.new_empty(0)
        self.__dict__["inner"] = embedding  # not a submodule: its weight is none of the model's parameters

    @property
    def weight(self) -> Tensor:
        """The table, (V, d)."""
        return self.table

    def forward(self, ids: Tensor) -> Tensor:
        """ids (…) → (…, d) on the ids' device."""
        rows = host_rows(self.table, ids.reshape(-1), self.table.dtype)
        return embedded(self.inner, rows, torch.arange(len(rows), device=ids.device).view(ids.shape))


def embedding_to_host(model: nn.Module) -> None:
    """Replace the model's input embedding by a `HostEmbedding`. `ConfigError` where that can't be or is of no use."""
    embedding, head = input_embedding(model), output_head(model)
    if isinstance(embedding, HostEmbedding):
        return
    if isinstance(embedding, AdaptedModule) or not isinstance(embedding, nn.Embedding):
        raise ConfigError("train.embedding: host: this model's embedding is adapted or none of torch's: leave it out")
    if embedding.weight.requires_grad:
        raise ConfigError("train.embedding: host: the embedding is trained (trainable tokens or whole): leave it out")
    if head is not None and getattr(head, "weight", None) is embedding.weight:
        raise ConfigError("train.embedding: host saves nothing: the output head needs the same table on the device")
    model.set_input_embeddings(HostEmbedding(embedding))

"""Small models outside transformers, one for each kind of layer that an adapter can stand on.

Each `Toy` also serves as an `Architecture`, so that the checks of the table run on it.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from conformance.models import Architecture
from torch import Tensor, nn


class Toy(nn.Module):
    """`layers` in a row with an odd non-linearity between them; answers like a transformers model."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> SimpleNamespace:
        for layer in self._modules.values():
            x = torch.tanh(layer(x)) if x.dtype.is_floating_point else layer(x)
        scores = x.flatten(1)
        return SimpleNamespace(logits=scores, loss=F.mse_loss(scores.float(), torch.full_like(scores, 0.3).float()))


class Attentive(nn.Module):
    """Self-attention with a mask, read out by a linear; `weights` also returns the attention weights' mean."""

    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 3, batch_first=batch_first, bias=bias)
        self.lin0 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> SimpleNamespace:
        hidden = x if self.mha.batch_first else x.transpose(0, 1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mixed, weights = self.mha(hidden, hidden, hidden, attn_mask=mask)
        mixed = mixed if self.mha.batch_first else mixed.transpose(0, 1)
        scores = self.lin0(mixed).flatten(1)
        return SimpleNamespace(logits=scores, loss=scores.square().mean() + weights.square().mean())


def transformers_conv1d(d_out: int, d_in: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(d_out, d_in)


def _floats(*shape: int):
    return lambda: {"x": torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))}


def _ids():
    return {"x": torch.tensor([[3, 0, 8, 1], [1, 1, 6, 2], [7, 2, 2, 10]])}


def _toy(name: str, make, batch, *targets: str, keep: str | None = "lin1") -> Architecture:
    return Architecture(name, make, batch, None, None, keep, targets=targets)


TOYS = [
    _toy("MLP", lambda: Toy(lin0=nn.Linear(10, 7), lin1=nn.Linear(7, 6)), _floats(10), "lin0"),
    _toy(
        "MLP, no bias",
        lambda: Toy(lin0=nn.Linear(10, 7, bias=False), lin1=nn.Linear(7, 6, bias=False)),
        _floats(3, 10),
        "lin0",
        "lin1",
        keep=None,
    ),
    _toy(
        "transformers Conv1D",
        lambda: Toy(conv=transformers_conv1d(7, 10), lin1=nn.Linear(7, 6)),
        _floats(3, 10),
        "conv",
    ),
    _toy("Embedding", lambda: Toy(emb=nn.Embedding(11, 9), lin1=nn.Linear(9, 6)), _ids, "emb"),
    _toy(
        "Embedding with padding, scaled by frequency",
        lambda: Toy(emb=nn.Embedding(11, 9, padding_idx=1, scale_grad_by_freq=True), lin1=nn.Linear(9, 6)),
        _ids,
        "emb",
    ),
    _toy(
        "Conv1d", lambda: Toy(conv=nn.Conv1d(6, 8, 3, stride=2, padding=1), lin1=nn.Linear(5, 6)), _floats(6, 9), "conv"
    ),
    _toy(
        "Conv2d",
        lambda: Toy(conv=nn.Conv2d(5, 9, (3, 2), padding=(1, 0), stride=(1, 2)), lin1=nn.Linear(5, 4)),
        _floats(5, 4, 11),
        "conv",
    ),
    _toy(
        "Conv2d, dilated",
        lambda: Toy(conv=nn.Conv2d(5, 9, 2, dilation=(1, 2)), lin1=nn.Linear(5, 4)),
        _floats(5, 4, 7),
        "conv",
    ),
    _toy(
        "Conv2d, circular padding",
        lambda: Toy(conv=nn.Conv2d(5, 9, 3, padding=1, padding_mode="circular"), lin1=nn.Linear(7, 4)),
        _floats(5, 4, 7),
        "conv",
    ),
    _toy(
        "Conv2d in groups",
        lambda: Toy(conv=nn.Conv2d(8, 12, 3, groups=2, bias=False), lin1=nn.Linear(5, 4)),
        _floats(8, 4, 7),
        "conv",
    ),
    _toy("Conv3d", lambda: Toy(conv=nn.Conv3d(5, 6, 2), lin1=nn.Linear(5, 4)), _floats(5, 3, 3, 6), "conv"),
    _toy("MultiheadAttention", Attentive, _floats(5, 12), "mha", keep="lin0"),
    _toy(
        "MultiheadAttention, sequence first", lambda: Attentive(batch_first=False), _floats(5, 12), "mha", keep="lin0"
    ),
    _toy("MultiheadAttention and linear", Attentive, _floats(5, 12), "mha", "lin0", keep=None),
]
TOY = {toy.name: toy for toy in TOYS}

"""Held-out loss: the mean over supervised tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.data.example import TokenizedExample
from veneer.training.forward import RowModel

CHUNK = 64


def heldout_loss(rows: RowModel, data: Sequence[TokenizedExample], max_tokens: int, limit: int | None = None) -> float:
    """Mean cross-entropy in nats per supervised token, without dropout and without gradients."""
    model, total, count = rows.model, 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        end = min(len(data), limit or len(data))
        for start in range(0, end, CHUNK):
            examples = [data[i] for i in range(start, min(start + CHUNK, end))]
            packed = rows.pack(examples, max_tokens, True)
            for row, loss in zip(packed, rows.losses(packed), strict=True):
                total += float(loss)
                count += len(row.targets)
    model.train(training)
    return total / max(1, count)

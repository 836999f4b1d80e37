"""Held-out loss: the mean over supervised tokens."""

from __future__ import annotations

import torch

from veneer.data.example import TokenizedExample
from veneer.data.prepare import PreparedData
from veneer.train.forward import RowModel

CHUNK = 64


def heldout_loss(rows: RowModel, data: PreparedData | list[TokenizedExample], max_tokens: int) -> float:
    """Mean cross-entropy in nats per supervised token, without dropout and without gradients."""
    model, total, count = rows.model, 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(data), CHUNK):
            examples = [data[i] for i in range(start, min(start + CHUNK, len(data)))]
            for row in rows.pack(examples, max_tokens, True):
                with rows.row(row) as loss:
                    total += float(loss)
                count += len(row.targets)
    model.train(training)
    return total / max(1, count)

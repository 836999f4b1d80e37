"""A step over a streamed or a resident base, and whether two of them are the same."""

from __future__ import annotations

import numpy as np
import torch

import veneer
from veneer.data.example import TokenizedExample
from veneer.training.accelerate import Accelerated
from veneer.training.flat import FlatOptimizer
from veneer.training.forward import RowModel
from veneer.training.streamed import StreamedRows

WIDE = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def examples(lengths, vocabulary=400):
    random = np.random.default_rng(0)
    return [
        TokenizedExample(random.integers(1, vocabulary, n).astype(np.int32), random.random(n) < 0.7) for n in lengths
    ]


EXAMPLES = examples((20, 33, 7, 40))


def step(
    model, adapter, *, modes="recompute", tokens=40, data=EXAMPLES, packing=True, compile=False, steps=1, dynamic=True
):
    """(losses by row, gradients by parameter) of one step, the last of several; streamed if the model is."""
    bank = veneer.attach(model, adapter, seed=0)
    streamed = hasattr(model, "veneer_stream")
    if streamed:
        model.veneer_stream.settle()
    torch.manual_seed(1)
    parameters = bank.parameters("default")
    for parameter in parameters.values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.train()
    optimizer = FlatOptimizer(parameters, veneer.OptimConfig())
    options = {"modes": modes, "compile": compile, "dynamic": dynamic}
    rows = StreamedRows(model, packing=packing, **options) if streamed else RowModel(model, packing=packing)
    fast = rows if streamed else Accelerated(model, **options)
    packed = rows.pack(data, tokens, True)
    supervised = sum(len(row.targets) for row in packed)
    torch.manual_seed(2)
    with rows.attention(), fast:
        for n in range(steps):
            if n:
                optimizer.step()
            optimizer.zero_grad()
            if streamed:
                losses = rows.backward(packed, supervised)
                continue
            losses = []
            for row in packed:
                fast.start()
                with rows.row(row) as loss:
                    (loss / supervised).backward()
                losses.append(loss.detach())
        if streamed and compile:
            assert all(part.packed for block in rows.blocks for part in block.modules() if hasattr(part, "packed"))
            for kept, loss in zip(losses, rows.losses(packed), strict=True):  # an evaluation has the step's factors
                torch.testing.assert_close(loss, kept)
    return losses, {name: p.grad.clone() for name, p in parameters.items() if p.requires_grad}


def same(found, wanted):
    for a, b in zip(found[0], wanted[0], strict=True):
        assert torch.equal(a, b)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert torch.equal(found[1][name], grad), name
    assert any(grad.abs().sum() > 0 for grad in wanted[1].values())


def save(model, path, tokenizer):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def close(found, wanted):
    torch.testing.assert_close(torch.stack(found[0]), torch.stack(wanted[0]), rtol=1e-5, atol=0)
    for name, grad in wanted[1].items():
        bound = 1e-5 * float(grad.abs().max()) + 1e-9
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=bound, msg=name)

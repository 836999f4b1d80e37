"""Twenty steps beside PEFT's on an NVIDIA GPU: the same losses in float32, and in bfloat16 as near as PEFT's own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import veneer
from conftest import GPU_SIZES, tiny_llama
from veneer.data.example import TokenizedExample
from veneer.training.accelerate import Accelerated
from veneer.training.flat import FlatOptimizer
from veneer.training.forward import RowModel
from veneer.training.graphs import RowGraphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
IDS = np.random.default_rng(0).integers(1, 60, (20, 4, 64))


def base(dtype):
    return tiny_llama(**GPU_SIZES, num_hidden_layers=3).to("cuda", dtype)


def veneers(dtype, adapter, mode):
    model = base(dtype).train()
    bank = veneer.load_adapter(model, adapter)
    config = veneer.OptimConfig(lr=3e-3, micro_batch_tokens=256, weight_decay=0.0)
    optimizer, rows = FlatOptimizer(bank.parameters(bank.names[0]), config), RowModel(model)
    fast, losses = Accelerated(model, modes=mode, note=print, dynamic=False), []
    graphs = RowGraphs(rows, fast, config, print)
    with rows.attention(), fast:
        for ids in IDS:
            examples = [TokenizedExample(row.astype(np.int32), np.ones(64, bool)) for row in ids]
            (row,) = rows.pack(examples, 256, False)
            optimizer.zero_grad()
            fast.start()
            losses.append(float(graphs.backward(row, 1 / len(row.targets))) / len(row.targets))
            optimizer.step()
    return torch.tensor(losses)


def pefts(dtype, adapter):
    from peft import PeftModel

    model = PeftModel.from_pretrained(base(dtype), adapter, is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    losses = []
    for ids in torch.from_numpy(IDS).cuda():
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return torch.tensor(losses)


@pytest.mark.parametrize("mode", ["keep", "selective", "recompute"])
def test_losses_over_twenty_steps_are_pefts(mode, tmp_path):
    model = base(torch.float32)
    veneer.attach(model, veneer.AdapterConfig(rank=8, alpha=16), seed=0)
    veneer.save_adapter(copy.deepcopy(model), tmp_path / "adapter")
    exact, theirs = (pefts(dtype, tmp_path / "adapter") for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(veneers(torch.float32, tmp_path / "adapter", mode), exact, rtol=2e-4, atol=2e-4)
    mine = veneers(torch.bfloat16, tmp_path / "adapter", mode)
    assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 0.01

"""Adapters of one row in compiled blocks: each ends where it does alone, and the code does not grow with their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_many import alone, assert_same, config, together

from conftest import tiny_llama
from veneer.data.example import TokenizedExample


def examples(seed: int, tokens: int = 12):
    """All of one length: on a CPU packed attention is code of its own for each number of sequences."""
    ids = np.random.default_rng(seed).integers(1, 400, (4, tokens)).astype(np.int32)
    return [TokenizedExample(row, np.arange(tokens) > 4) for row in ids]


@pytest.fixture
def traced(monkeypatch):
    """Blocks are traced but no code is generated; the number of inputs of each graph."""
    from torch._dynamo.backends.debugging import aot_eager

    found = []

    def compile_fx(graph, inputs):
        found.append(len(inputs))
        return aot_eager(graph, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def configs(path, adapters, **train):
    train = {"batch_size": 1, "max_steps": 2} | train
    return [config(path / f"{i}", adapter=adapter, train=train) for i, adapter in enumerate(adapters)]


def compiled(found):
    return [one.model_copy(update={"train": one.train.model_copy(update={"compile": "on"})}) for one in found]


def test_compiled_blocks_give_each_adapter_what_it_has_alone(tmp_path, traced):
    model, data = tiny_llama(num_hidden_layers=2).double(), [examples(i) for i in range(3)]
    adapters = [
        {"rank": 3, "alpha": 5.0},
        {"rank": 8, "target_modules": "attention", "lora_fa": True},
        {"rank": 2, "target_modules": ["down_proj", "q_proj"], "layers": [1]},
    ]
    plain = configs(tmp_path, adapters)
    expected = alone(model, plain, data)
    assert not traced
    for lane, one in zip(together(model, compiled(plain), data, tokens=4096), expected):
        assert_same(lane.config.out, one.out, 1e-4)
    assert traced


def test_a_neighbours_start_and_rank_change_nothing_and_need_no_other_code(tmp_path, traced):
    model, data = tiny_llama(num_hidden_layers=2).double(), [examples(i) for i in range(2)]
    ends, graphs = [], []
    for number, other in enumerate(({"rank": 3}, {"rank": 7, "alpha": 90.0, "init": "gaussian"})):
        mine = configs(tmp_path / str(number), [{"rank": 4}, other])
        ends.append(together(model, compiled(mine), data, tokens=4096)[0].config.out)
        graphs.append(len(traced))
    assert graphs[0] == graphs[1] > 0
    assert_same(*ends, 1e-6)


def test_compiled_code_does_not_grow_with_the_adapters(tmp_path, traced):
    model, data = tiny_llama(num_hidden_layers=2), [examples(i) for i in range(4)]
    inputs = []
    for name, ranks in {"two": (3, 5), "four": (3, 5, 6, 7)}.items():
        mine = configs(tmp_path / name, [{"rank": rank, "target_modules": "mlp"} for rank in ranks])
        traced.clear()
        together(model, compiled(mine), data, tokens=4096)
        inputs.append(list(traced))
        torch._dynamo.reset()
    assert inputs[0] and inputs[0] == inputs[1]

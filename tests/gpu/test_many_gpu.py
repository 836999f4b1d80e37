"""Adapters trained together on a GPU end where each ends alone, compiled or not, and a NaN stays with its adapter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from test_many import alone, assert_same, config, examples, spoil, together  # noqa: E402

from conftest import tiny_llama  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_together_as_alone(compiled, tmp_path):
    model = tiny_llama(num_hidden_layers=3, hidden_size=64, intermediate_size=96, num_attention_heads=4).double().cuda()
    adapters = [{"rank": 2}, {"rank": 8, "target_modules": "mlp"}, {"rank": 4, "layers": [1, 2]}]
    configs = [
        config(tmp_path / f"{i}", seed=i, adapter=a, train={"compile": compiled, "epochs": 2})
        for i, a in enumerate(adapters)
    ]
    data = [examples(i, 9) for i in range(3)]
    expected = alone(model, configs, data)
    for lane, one in zip(together(model, configs, data, tokens=4096), expected):
        assert lane.status == "finished"
        assert_same(lane.config.out, one.out, 1e-3)


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_nan_stays_with_its_adapter(compiled, tmp_path):
    model = tiny_llama(hidden_size=64, intermediate_size=96, num_attention_heads=4).double().cuda()
    configs = [config(tmp_path / f"{i}", seed=i, train={"compile": compiled}) for i in range(3)]
    data = [examples(i) for i in range(3)]
    expected = alone(model, configs, data)

    lanes = together(model, configs, data, tokens=4096, spoil=spoil)
    assert [lane.status for lane in lanes] == ["finished", "diverged", "finished"]
    for n in (0, 2):
        assert_same(configs[n].out, expected[n].out, 1e-3)

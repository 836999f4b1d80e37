"""Blocks whose linears are packed: found by watching, equal to the plain blocks, and put back as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import veneer
from conftest import tiny_llama
from veneer.kernels.gated_mlp import gated_mlp, graph_gated_mlps
from veneer.training.accelerate import Accelerated
from veneer.training.graphs import MOST, padded, rounded
from veneer.training.packing import Packing, watch

IDS = torch.arange(1, 40)[None]


def adapted(seed=1, hidden_act="silu", **config):
    model = tiny_llama(num_hidden_layers=3, hidden_act=hidden_act).train()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, **config), seed=0)
    torch.manual_seed(seed)
    for p in bank.parameters("default").values():
        p.data.normal_().mul_(0.1)
    return model, bank


def groups_of(model):
    with watch(model.model.layers[0]) as groups:
        model(input_ids=IDS, use_cache=False)
    return groups


def test_linears_of_one_input_are_found_by_watching():
    model, _ = adapted()
    found = [[name.rsplit(".", 1)[-1] for name in group] for group in groups_of(model)]
    assert found == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_packing_keeps_what_the_model_computes_and_is_undone_bit_for_bit():
    model, bank = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    packing = Packing()
    packing.pack(model.model.layers, groups_of(model))
    packing.refresh()
    assert len(packing.groups) == 12
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, wanted)
    one = packing.groups[0]
    for layer, (a, b) in zip(one.layers, one.views):
        assert torch.equal(a, layer.lora_A["default"])
        assert torch.equal(b, layer.scaling["default"] * layer.lora_B["default"])
    packing.unpack()
    assert all(torch.equal(p, before[name]) and p.is_contiguous() for name, p in model.named_parameters())
    assert all(layer.packed is None for layer in bank.layers.values())


def test_a_refresh_sees_new_factors_and_new_scales():
    model, bank = adapted()
    packing = Packing()
    packing.pack(model.model.layers, groups_of(model))
    packing.refresh()
    for layer in bank.layers.values():
        layer.scaling["default"] *= 3
        layer.lora_A["default"] = torch.nn.Parameter(layer.lora_A["default"] + 1)
    packing.refresh()
    for group in packing.groups:
        wanted = [scale for scale, rank in zip(group.scales, group.ranks) for _ in range(rank)]
        assert torch.equal(group.scaling, torch.tensor(wanted))
        for layer, (a, b) in zip(group.layers, group.views):
            assert torch.equal(a, layer.lora_A["default"])
            assert torch.equal(b, layer.scaling["default"] * layer.lora_B["default"])


@pytest.mark.parametrize(
    "config", [{"dropout": 0.1}, {"dora": True}, {"init": "pissa"}, {"lora_bias": True}, {"lora_fa": True}], ids=str
)
def test_what_is_no_plain_lora_is_not_packed(config):
    model, _ = adapted(**config)
    packing = Packing()
    packing.pack(model.model.layers, groups_of(model))
    assert not packing.groups


def test_a_trained_or_shared_weight_is_not_packed():
    model, _ = adapted()
    groups = groups_of(model)
    model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    packing = Packing()
    packing.pack(model.model.layers, groups)
    assert len(packing.groups) == 11


def gradients(mode, compile, hidden_act="silu"):
    model, bank = adapted(hidden_act=hidden_act)
    parameters = bank.parameters("default")
    notes = []
    with Accelerated(model, modes=mode, compile=compile, note=notes.append) as fast:
        for step in range(2):  # the second step sees factors that have changed
            model.zero_grad()
            fast.start()
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
            if step == 0:
                for p in parameters.values():
                    p.data -= 0.5 * p.grad
        for p in parameters.values():
            p.data -= 0.5 * p.grad
        with torch.no_grad():  # an evaluation after the update
            after = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        packed = len(fast.packing.groups)
    assert not notes
    return (loss.detach(), after), {name: p.grad for name, p in parameters.items()}, packed


@pytest.mark.parametrize(("mode", "act"), [("selective", "silu"), ("recompute", "gelu_pytorch_tanh")])
def test_compiled_blocks_give_the_plain_gradients(mode, act, monkeypatch):
    graphs = []

    def noted(graph, **options):
        graph_gated_mlps(graph, **options)
        graphs.append(any(node.target is gated_mlp for node in graph.graph.nodes))

    monkeypatch.setattr("veneer.kernels.gated_mlp.graph_gated_mlps", noted)
    loss, wanted, none = gradients("keep", False, act)
    again, found, packed = gradients(mode, True, act)
    assert (none, packed) == (0, 12)
    assert graphs and all(graphs)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    assert abs(loss[1] - loss[0]) > 1e-5 * loss[0]  # or stale factors would not show
    for name, grad in wanted.items():
        assert (found[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def test_a_padded_row_has_the_loss_of_the_row():
    import numpy as np

    from veneer.data.example import TokenizedExample
    from veneer.training.forward import RowModel

    model, _ = adapted()
    rows = RowModel(model.eval())
    random = np.random.default_rng(0)
    examples = [
        TokenizedExample(random.integers(1, 60, n).astype(np.int32), random.random(n) < 0.6) for n in (9, 14, 5)
    ]
    (row,) = rows.pack(examples, 1000, False)
    more = padded(row, rounded(len(row.input_ids)), len(row.targets) + 5)
    assert len(more.input_ids) == 32 and (more.targets[-5:] == -1).all()
    with rows.attention():
        with rows.row(row) as wanted, torch.no_grad():
            wanted = wanted.detach()
        with rows.row(more) as found:
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-6, atol=1e-5)


@given(most=st.integers(64, 1 << 18))
def test_rows_are_rounded_to_few_sizes(most):
    counts = [*range(1, 64), *(most * n // 400 for n in range(25, 401))]
    sizes = [rounded(count) for count in counts]
    assert all(count <= size <= max(count + 15, 1.25 * count) for count, size in zip(counts, sizes))
    assert len({size for size in sizes[63:]}) <= MOST

"""Blocks that keep, recompute or send away what backward needs give the same gradients, and the dial is per block."""

import pytest
import torch

import veneer
from conftest import tiny_llama
from veneer.adapter.blocks import repeated_blocks, spread
from veneer.training.accelerate import Accelerated, draws_random
from veneer.training.store import _dense

IDS = torch.arange(1, 40)[None]


def gradients(modes):
    model = tiny_llama(num_hidden_layers=4).train()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4), seed=0)
    torch.manual_seed(1)
    for p in bank.parameters("default").values():
        p.data.normal_()
    with Accelerated(model, modes=modes, compile=False) as fast:
        for _ in range(2):  # the second pass uses the buffers of the first
            model.zero_grad()
            fast.start()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
        grads = {k: p.grad for k, p in bank.parameters("default").items()}
        with torch.no_grad():
            held = {size: len(buffers) for size, buffers in fast.store.host.free.items()}
            model(input_ids=IDS)  # an evaluation moves nothing
            assert {size: len(buffers) for size, buffers in fast.store.host.free.items()} == held
    assert all("forward" not in block.__dict__ for block in fast.blocks)
    return loss.detach(), grads, fast.store


@pytest.mark.parametrize(
    "modes",
    [
        ["recompute"] * 4,
        ["recompute-offload"] * 4,
        ["offload"] * 4,
        ["keep", "offload", "recompute-offload", "selective"],
    ],
    ids="+".join,
)
def test_every_setting_of_the_dial_gives_the_same_gradients(modes, monkeypatch):
    monkeypatch.setattr("veneer.training.store.SMALL", 1)
    loss, wanted, _ = gradients(["keep"] * 4)
    again, found, store = gradients(modes)
    assert torch.equal(loss, again)
    for key, grad in wanted.items():
        assert torch.equal(found[key], grad), key
    moved = sum("offload" in mode for mode in modes)
    assert (len(store.host.free) > 0) == (moved > 0)


def test_blocks_are_found_by_structure():
    from torch import nn

    model = tiny_llama()
    assert repeated_blocks(model) == []  # nothing is adapted yet
    veneer.attach(model, veneer.AdapterConfig(rank=2))
    assert repeated_blocks(model) == list(model.model.layers)
    tree = nn.ModuleList(
        [nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))]
    )
    outer = nn.Sequential(tree, nn.Linear(4, 4))
    veneer.attach(outer, veneer.AdapterConfig(rank=2))
    assert repeated_blocks(outer) == list(tree)


def test_dense_tensors_are_those_without_gaps():
    x = torch.randn(4, 6)
    assert _dense(x) and _dense(x.t()) and _dense(x[1:3]) and not _dense(x[:, :3]) and not _dense(x[:1].expand(3, 6))


def test_the_dial_spreads_over_the_blocks_and_dropout_is_noticed():
    assert spread("selective", 3) == ["selective"] * 3
    assert spread("mixed", 4, 1) == ["mixed"] * 3 + ["selective"] and spread("keep", 2, 1) == ["keep"] * 2
    eager = spread("mixed", 4, compiled=False)
    assert eager == ["recompute-offload", "offload", "recompute-offload", "recompute-offload"]
    model = tiny_llama()
    veneer.attach(model, veneer.AdapterConfig(rank=2))
    assert not draws_random(model)
    veneer.attach(model, veneer.AdapterConfig(rank=2, dropout=0.1), name="two")
    assert draws_random(model) and draws_random(tiny_llama(attention_dropout=0.1))

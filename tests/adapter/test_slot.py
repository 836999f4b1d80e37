"""Slots: other factors in the same addresses; renaming; memory over many cycles."""

import gc
import weakref

import pytest
import torch

import veneer
from conftest import tiny_llama
from veneer.adapter.slot import prepare, swap
from veneer.errors import AdapterStateError

IDS = torch.tensor([[3, 5, 8, 13, 21]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def randomise(bank, name):
    for i, p in enumerate(bank.parameters(name).values()):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i + p.numel())))


@pytest.fixture
def saved(tmp_path):
    """Two adapters of other ranks, scalings and targets on disk, with the logits that each gives."""
    found = {}
    for name, options in {
        "small": {"rank": 2, "alpha": 5, "target_modules": ["q_proj", "down_proj"]},
        "wide": {"rank": 6, "alpha": 3, "rslora": True, "rank_pattern": {"v_proj": 3}, "target_modules": "all-linear"},
    }.items():
        model = tiny_llama()
        bank = veneer.attach(model, veneer.AdapterConfig(**options))
        randomise(bank, "default")
        found[name] = veneer.save_adapter(model, tmp_path / name), logits(model)
    return found


def test_a_swap_changes_the_factors_and_no_address(saved, tmp_path):
    model = tiny_llama()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, alpha=7), name="slot")
    randomise(bank, "slot")
    before = logits(model)
    slot = veneer.reserve(bank, "slot", 8)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    addresses = {key: p.data_ptr() for key, p in bank.parameters("slot").items()}
    for name in ("small", "wide", "small"):
        path, wanted = saved[name]
        veneer.swap_adapter(model, path, name="slot")
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
        assert {key: p.data_ptr() for key, p in bank.parameters("slot").items()} == addresses
    again = tiny_llama()
    veneer.load_adapter(again, veneer.save_adapter(model, tmp_path / "slot"))
    torch.testing.assert_close(logits(again), saved["small"][1], rtol=1e-4, atol=1e-4)
    bank.rename("slot", "door")
    ready = prepare(bank, "door", {})
    swap(bank, "door", ready)  # an empty adapter: the base
    with bank.disabled():
        base = logits(model)
    assert torch.equal(logits(model), base) and slot.bytes == 4 * sum(
        p.numel() for p in bank.parameters("door").values()
    )


def test_a_swap_compiles_nothing_anew(saved):
    model, counted = tiny_llama(), 0

    def backend(graph, inputs):
        nonlocal counted
        counted += 1
        return graph.forward

    bank = veneer.attach(model, veneer.AdapterConfig(rank=4), name="slot")
    veneer.reserve(bank, "slot", 8)
    block, x = model.model.layers[0].mlp, torch.randn(3, 36, generator=torch.Generator().manual_seed(0))
    compiled, seen = torch.compile(block, backend=backend), []
    counts = []
    with torch.no_grad():
        for name in (None, *saved):
            if name:
                veneer.swap_adapter(model, saved[name][0], name="slot")
            seen.append(compiled(x))
            torch.testing.assert_close(seen[-1], block(x))
            counts.append(counted)
    assert counts[0] > 0 and counts == [counts[0]] * 3
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(seen, seen[1:]))


def test_what_a_slot_cannot_hold_is_refused_and_leaves_it_as_it_was(saved, tmp_path):
    model = tiny_llama()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, target_modules=["q_proj", "down_proj"]), name="slot")
    with pytest.raises(AdapterStateError, match="is no slot"):
        veneer.swap_adapter(model, saved["small"][0], name="slot")
    with pytest.raises(AdapterStateError, match="rank 4, above the 3"):
        veneer.reserve(bank, "slot", 3)
    veneer.reserve(bank, "slot", 4)
    before = logits(model)
    with pytest.raises(AdapterStateError, match="has no model.layers.0"):
        veneer.swap_adapter(model, saved["wide"][0], name="slot")
    a, b = torch.ones(6, 36), torch.ones(36, 6)
    with pytest.raises(AdapterStateError, match="rank 6, above the 4"):
        swap(bank, "slot", {"model.layers.0.self_attn.q_proj": (a, b, 1.0)})
    with pytest.raises(AdapterStateError, match="do not fit"):
        swap(bank, "slot", {"model.layers.0.self_attn.q_proj": (a[:2], b, 1.0)})
    assert torch.equal(logits(model), before)
    for options, word in (({"dora": True}, "dora"), ({"trainable_tokens": [3]}, "trained tokens"),
                          ({"invocation": [3]}, "invocation"), ({"init": "pissa"}, "counts twice"),
                          ({"modules_to_save": ["norm"]}, "whole modules")):  # fmt: skip
        other = veneer.attach(tiny_llama(tie_word_embeddings=False), veneer.AdapterConfig(rank=2, **options))
        with pytest.raises(AdapterStateError, match=word):
            veneer.reserve(other, "default", 4)


def test_renaming_keeps_order_weights_and_parameters():
    model = tiny_llama()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2, trainable_tokens=[5]), name="a")
    veneer.attach(model, veneer.AdapterConfig(rank=3, target_modules=["embed_tokens"], tied_head="both",
                                              modules_to_save=["norm"]), name="b")  # fmt: skip
    randomise(bank, "a")
    bank.activate("a")
    live, held = logits(model), dict(bank.parameters("a"))
    bank.rename("a", "c")
    assert bank.names == ["c", "b"] and bank.active == {"c": 1.0}
    assert torch.equal(logits(model), live)
    assert all(bank.parameters("c")[key] is p for key, p in held.items())
    with pytest.raises(AdapterStateError, match="taken"):
        bank.rename("c", "b")
    with pytest.raises(AdapterStateError, match="no adapter 'a'"):
        bank.rename("a", "d")
    bank.rename("b", "e")
    bank.activate("e")
    bank.activate("c")
    assert torch.equal(logits(model), live)


def test_a_thousand_adapters_come_and_go_and_leave_nothing():
    model = tiny_llama(num_hidden_layers=1)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=1, target_modules=["q_proj"]), name="stays")
    gc.collect()
    before, gone = sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), []
    config = veneer.AdapterConfig(rank=2, target_modules=["q_proj", "v_proj"])
    for i in range(1000):
        veneer.attach(model, config, name="guest")
        if i % 100 == 0:
            gone.append(weakref.ref(bank.layers["model.layers.0.self_attn.q_proj"].lora_A["guest"]))
        bank.remove("guest")
    gc.collect()
    assert all(reference() is None for reference in gone)
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= before + 2
    assert bank.names == ["stays"] and set(bank.layers) >= {"model.layers.0.self_attn.q_proj"}

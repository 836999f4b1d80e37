"""Spectra from factors against dense ΔW, the weights' norms against the model's, and the page."""

from __future__ import annotations

import re

import pytest
import torch
from conformance.models import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import veneer
from veneer.config import AdapterConfig
from veneer.errors import AdapterFormatError, BaseModelError, WrongBaseError
from veneer.plan.spectrum import analyse, entropy_rank, rank_for, singular_values, stable_rank
from veneer.report.spectra import render, write_page

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 9), d_in=st.integers(1, 12), d_out=st.integers(1, 12), scale=st.floats(-3, 3))
def test_singular_values_are_those_of_the_dense_product(rank, d_in, d_out, scale):
    torch.manual_seed(rank + 10 * d_in + 100 * d_out)
    lora_A, lora_B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    dense = torch.linalg.svdvals(scale * (lora_B.double() @ lora_A.double()))
    found = singular_values(lora_A, lora_B, scale)
    assert found.shape == (min(rank, d_in, d_out),)
    assert torch.allclose(found, dense[: len(found)], rtol=1e-9, atol=1e-9 * float(dense[0]) + 1e-300)
    assert dense[len(found) :].sum() <= 1e-9 * dense[0]


def test_effective_ranks_of_known_spectra():
    equal, one, none = torch.ones(5).double() * 3, torch.tensor([2.0, 0.0, 0.0]), torch.zeros(4)
    assert entropy_rank(equal) == pytest.approx(5) and stable_rank(equal) == pytest.approx(5)
    assert entropy_rank(one) == pytest.approx(1) and stable_rank(one) == pytest.approx(1)
    assert entropy_rank(none) == stable_rank(none) == rank_for(none) == 0
    two = torch.tensor([3.0, 1.0]).double()  # p = 3/4, 1/4
    assert entropy_rank(two) == pytest.approx(4 / 3**0.75) and stable_rank(two) == pytest.approx(10 / 9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=9), st.floats(0.01, 1.0))
def test_rank_for_is_the_least_that_keeps_the_share(sigma, share):
    energy = torch.tensor(sorted(sigma, reverse=True), dtype=torch.float64).square()
    rank, total = rank_for(energy, share), energy.sum()
    if total == 0:
        return
    assert energy[:rank].sum() >= share * total * (1 - 1e-9)
    assert rank == 1 or energy[: rank - 1].sum() < share * total


def trained(model, config, path, seed=0):
    """An adapter whose factors are all random, on disk; returns its bank."""
    bank = veneer.attach(model, config, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters("default").values():
            parameter.normal_(std=0.3)
    veneer.save_adapter(model, path)
    return bank


@pytest.mark.parametrize(
    "name, options",
    [
        ("Llama", {"rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 7}}),
        ("Gemma 2", {"target_modules": ["embed_tokens", "v_proj"], "tied_head": "embedding"}),
        ("GPT-2", {"target_modules": ["c_attn", "c_proj", "wte"], "tied_head": "embedding"}),
        ("T5", {"target_modules": "attention"}),
        ("ViT, image classification", {"target_modules": ["projection", "q_proj"]}),
        ("Llama", {"init": "pissa"}),
        ("Qwen3-MoE", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("Mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("BERT, sequence classification", {"target_modules": "all-linear"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_layer_against_its_dense_update(name, options, tmp_path):
    model = BY_NAME[name].model()
    model.save_pretrained(tmp_path / "base")
    bank = trained(model, AdapterConfig(**{"rank": 4, "alpha": 6} | options), tmp_path / "adapter")
    found = analyse(tmp_path / "adapter", str(tmp_path / "base"))
    assert {layer.name for layer in found.layers} == set(bank.entries["default"].targets)
    for layer in found.layers:
        mine = bank.layers[layer.name]
        delta = mine.delta("default").detach().double()
        assert layer.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert layer.weight_norm == pytest.approx(float(mine.weight.double().norm()), rel=1e-5)
        assert layer.relative_norm == pytest.approx(float(delta.norm() / mine.weight.double().norm()), rel=1e-4)
        each = torch.linalg.svdvals(delta if layer.experts > 1 else delta.flatten(1))
        each = each if each.ndim == 2 else each[None]
        dense = each.square().sum(0).sqrt()[: len(layer.singular_values)]
        assert torch.tensor(layer.singular_values).allclose(dense.float(), rtol=1e-4, atol=1e-4 * float(dense[0]))
        kept = each.square().sum(0)
        assert kept[: layer.rank_99].sum() >= 0.99 * kept.sum() * (1 - 1e-5)
        assert kept[: layer.rank_99 - 1].sum() < 0.99 * kept.sum() * (1 + 1e-5)
        assert 1 <= layer.stable_rank <= layer.effective_rank * (1 + 1e-6) <= layer.rank * (1 + 1e-5)
        assert layer.full_parameters == mine.weight.numel()
    assert found.norm == pytest.approx(sum(layer.norm**2 for layer in found.layers) ** 0.5)
    order = [layer.relative_norm for layer in found.changed_most()]
    assert order == sorted(order, reverse=True)


def test_the_rank_that_keeps_99_percent_is_what_resize_loses(tmp_path):
    bank = trained(BY_NAME["Llama"].model(), AdapterConfig(rank=6), tmp_path / "adapter")
    with torch.no_grad():  # a falling spectrum
        for name, parameter in bank.parameters("default").items():
            if name.endswith("lora_A"):
                parameter.mul_(torch.tensor([1, 0.5, 0.2, 0.05, 0.01, 0.001])[:, None])
    veneer.save_adapter(bank.model, tmp_path / "adapter")
    found = analyse(tmp_path / "adapter")
    summary = found.summary()
    rank = summary["rank_99"]
    assert 1 < rank <= summary["rank_99_each"] < 6
    lost = {r: veneer.resize(tmp_path / "adapter", tmp_path / f"r{r}", rank=r).error ** 2 for r in (rank - 1, rank)}
    assert lost[rank] <= 0.01 < lost[rank - 1]
    assert 1 - found.energy_kept[rank - 1] == pytest.approx(lost[rank], rel=1e-3)


def test_attention_and_convolutions_outside_transformers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.mha, model.conv = nn.MultiheadAttention(8, 2), nn.Conv1d(6, 5, 3)
    bank = trained(model, AdapterConfig(rank=2, target_modules=["mha", "conv"]), tmp_path / "adapter")
    found = {layer.name: layer.norm for layer in analyse(tmp_path / "adapter").layers}
    assert found.keys() == {"mha", "mha.out_proj", "conv"}
    for name, norm in found.items():
        assert norm == pytest.approx(float(bank.layers[name].delta("default").detach().norm()), rel=1e-5)


def test_what_is_no_low_rank_update_is_said(tmp_path):
    model = BY_NAME["Llama"].model()
    trained(model, AdapterConfig(rank=2, dora=True, modules_to_save=["norm"]), tmp_path / "adapter")
    notes = analyse(tmp_path / "adapter").notes
    assert any("DoRA" in note for note in notes) and any("1 tensors (24 numbers) are trained whole" in n for n in notes)
    veneer.detach(model)
    veneer.attach(model, AdapterConfig(rank=2, target_modules=[], trainable_tokens=[3]))
    veneer.save_adapter(model, tmp_path / "tokens")
    with pytest.raises(AdapterFormatError, match="no low-rank factors"):
        analyse(tmp_path / "tokens")
    veneer.detach(model)
    veneer.attach(model, AdapterConfig(rank=2))
    veneer.save_adapter(model, tmp_path / "fresh")
    fresh = analyse(tmp_path / "fresh")
    assert "not trained" in fresh.notes[-1] and fresh.summary()["rank_99"] == 0 and fresh.energy_kept == []
    assert "<svg" in render(fresh)


def test_a_base_that_does_not_fit(tmp_path):
    trained(BY_NAME["Llama"].model(), AdapterConfig(rank=2), tmp_path / "adapter")
    BY_NAME["GPT-2"].model().save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBaseError, match="holds none of the weights"):
        analyse(tmp_path / "adapter", str(tmp_path / "other"))
    for missing in (str(tmp_path / "nothing"), "someone/nothing", "smollm2-135m-instruct"):
        with pytest.raises(BaseModelError):
            analyse(tmp_path / "adapter", missing)


def test_the_page_stands_alone_and_escapes(tmp_path):
    path = tmp_path / "<b>run"
    model = BY_NAME["Llama"].model()
    model.save_pretrained(tmp_path / "base")
    trained(model, AdapterConfig(rank=3), path)
    page = write_page(analyse(path, str(tmp_path / "base")), tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4 and "&lt;b&gt;run" in page and "<b>run" not in page
    assert not re.search(r'(src|href)="(?!#)|@import|url\(http', page)
    assert "currentColor" in page and "#010203" not in page and "prefers-color-scheme: dark" in page
    for words in ("Effective rank", "Roy and Vetterli", "model.layers.1.mlp.down_proj", "‖ΔW‖ / ‖W‖", "99 %: rank"):
        assert words in page

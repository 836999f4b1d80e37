"""Adapters in memory without a model: lossless both ways, and the scalings that files give and get."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from conformance.toys import TOY
from formats.adapters import EXPERTS, moe, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import veneer
from conftest import tiny_llama
from veneer.errors import AdapterFormatError, AdapterStateError
from veneer.formats.adapter_file import read_adapter, write_adapter

FILES = ("adapter_config.json", "adapter_model.safetensors", "veneer.json")
CASES = {
    "patterns": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {r"layers\.0\..*": 5}},
    "rslora": {"rslora": True, "target_modules": ["embed_tokens", "q_proj"], "tied_head": "embedding"},
    "dora": {"dora": True},
    "bias": {"lora_bias": True},
    "kept": {"modules_to_save": ["model.norm"]},
    "tokens": {"trainable_tokens": [3, 5], "tied_head": "both"},
    "tokens alone": {"trainable_tokens": [3, 5], "tied_head": "both", "target_modules": []},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_written_byte_for_byte(tmp_path, case):
    first = saved(tmp_path / "a", tiny_llama(), **CASES[case])
    adapter = read_adapter(first)
    write_adapter(adapter, tmp_path / "b")
    for name in FILES:
        assert (first / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert adapter.path == first and bool(adapter.layers) == (case != "tokens alone")


@pytest.mark.parametrize("toy", ["Conv2d", "Embedding", "MultiheadAttention and linear"])
def test_every_kind_of_layer_keeps_its_delta(tmp_path, toy):
    model = TOY[toy].model()
    adapter = read_adapter(saved(tmp_path / "a", model, target_modules=list(TOY[toy].targets), alpha=3))
    bank = veneer.get_bank(model)
    for path, f in adapter.layers.items():
        ((a, b),) = f.pairs()
        wanted = bank.layers[path.replace(".base_layer", "")].delta("default")
        found = f.scaling * b @ a
        assert torch.allclose((found.t() if f.embedding else found).reshape(wanted.shape), wanted, atol=1e-6)
        assert torch.equal(f.with_pairs([(a, b)], f.scaling).lora_A, f.lora_A)
    write_adapter(adapter, tmp_path / "b")
    assert (tmp_path / "a" / FILES[1]).read_bytes() == (tmp_path / "b" / FILES[1]).read_bytes()


def test_fused_experts_come_apart_and_together(tmp_path):
    model = moe()
    adapter = read_adapter(saved(tmp_path / "a", model, **EXPERTS))
    assert len(adapter.layers) == 4
    for f in adapter.layers.values():
        assert f.experts == 5 and f.rank == 3 and len(f.pairs()) == 5
        again = f.with_pairs(f.pairs(), f.scaling)
        assert torch.equal(again.lora_A, f.lora_A) and torch.equal(again.lora_B, f.lora_B)
    (layer,) = [
        bank for name, bank in veneer.get_bank(model).layers.items() if name.endswith("0.mlp.experts.down_proj")
    ]
    f = adapter.layers["model.layers.0.mlp.experts"]  # the last parameter stands outermost
    delta = torch.stack([f.scaling * b @ a for a, b in f.pairs()])
    assert torch.allclose(delta, layer.delta("default"), atol=1e-6)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0.01, 50)), min_size=4, max_size=4), st.booleans())
def test_any_ranks_and_scalings_survive_and_peft_reads_them(tmp_path, wanted, rslora):
    if not (tmp_path / "a").exists():
        saved(tmp_path / "a", tiny_llama())
    adapter = read_adapter(tmp_path / "a")
    adapter.fields["use_rslora"] = rslora
    for (name, f), (rank, scaling) in zip(list(adapter.layers.items()), wanted):
        a, b = torch.ones(rank, f.lora_A.shape[1]), torch.ones(f.lora_B.shape[0], rank)
        adapter.layers[name] = replace(f, lora_A=a, lora_B=b, scaling=scaling)
    write_adapter(adapter, tmp_path / "b")
    again = read_adapter(tmp_path / "b")
    model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "b")
    for (name, f), (rank, scaling) in zip(again.layers.items(), wanted):
        assert f.rank == rank and f.scaling == pytest.approx(scaling, rel=1e-12)
        layer = model.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == pytest.approx(scaling, rel=1e-12) and layer.r["default"] == rank


def test_a_scaling_of_zero_or_below_goes_into_b(tmp_path):
    adapter = read_adapter(saved(tmp_path / "a", tiny_llama()))
    name, f = next(iter(adapter.layers.items()))
    adapter.layers[name] = replace(f, scaling=-0.5)
    write_adapter(adapter, tmp_path / "b")
    again = read_adapter(tmp_path / "b").layers[name]
    assert again.scaling == 1.0 and torch.equal(again.lora_B, -0.5 * f.lora_B)


def test_damage_is_named(tmp_path):
    first = saved(tmp_path / "a", tiny_llama())
    tensors, fields = load_file(first / FILES[1]), json.loads((first / FILES[0]).read_text())
    key = next(key for key in tensors if key.endswith("0.self_attn.q_proj.lora_A.weight"))
    with pytest.raises(AdapterFormatError, match="lacks lora_A"):
        save_file({k: v for k, v in tensors.items() if k != key}, first / FILES[1])
        read_adapter(first)
    with pytest.raises(AdapterFormatError, match="NaN"):
        save_file(tensors | {key: tensors[key] * float("nan")}, first / FILES[1])
        read_adapter(first)
    with pytest.raises(AdapterFormatError, match="its rank is 4"):
        save_file(tensors | {key: tensors[key][:3].clone()}, first / FILES[1])
        read_adapter(first)
    with pytest.raises(AdapterFormatError, match="damaged"):
        (first / FILES[1]).write_bytes(b"123")
        read_adapter(first)
    (first / FILES[0]).write_text(json.dumps(fields | {"peft_type": "IA3"}))
    with pytest.raises(AdapterFormatError, match="IA3"):
        read_adapter(first)


def test_a_grouped_convolution_is_refused_and_no_other_directory_is_replaced(tmp_path):
    toy = TOY["Conv2d in groups"]
    with pytest.raises(AdapterFormatError, match="grouped convolution"):
        read_adapter(saved(tmp_path / "a", toy.model(), target_modules=list(toy.targets)))
    adapter = read_adapter(saved(tmp_path / "b", tiny_llama()))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(AdapterStateError, match="no adapter directory"):
        write_adapter(adapter, tmp_path / "mine")

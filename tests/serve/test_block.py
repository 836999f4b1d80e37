"""Blocks served with few launches: kernels against their twins, and models of every known kind against each adapter alone."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.block_checks import check_range
from serve.served import Alone, GraphEngine, ask, engine_of, read, write
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from conftest import tiny_llama
from veneer.errors import BaseModelError
from veneer.kernels import served, served_block
from veneer.serve.block import Products
from veneer.serve.graphs import GraphRunner, dealt
from veneer.serve.static import StaticRows

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def tiny(kind, **options):
    """A random model of a family, of 4 heads on 2 key heads."""
    sizes = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 900, "max_position_embeddings": 256,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes | options)).eval()
    for name, parameter in model.named_parameters():  # norms and biases that matter
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_known_block_answers_as_each_adapter_alone(kind, tokenizer, tmp_path):
    options = {"sliding_window": 9} if kind == "mistral" else {}
    for name, seed, targets in (("a", 1, "qv"), ("b", 2, "all"), ("c", 3, "mlp")):
        write(tmp_path / name, seed, targets=targets, model=tiny(kind, **options))
    alone = Alone(tokenizer, {name: tmp_path / name for name in "abc"}, tiny(kind, **options))
    engine, _ = engine_of(tokenizer, tmp_path, tiny(kind, **options), GraphEngine, "abc", slots=8)
    assert engine.runner.fused
    stacks = [(), (("a", 1.0),), (("b", 0.7),), (("c", 1.0),), (("a", 0.7), ("b", -0.3)), (("b", 1.0),)]
    asked = [(stack, ask(engine, "which of them answers this", 14, stack)) for stack in stacks]
    for stack, ticket in asked:
        assert read(ticket) == alone(stack, "which of them answers this", 14)
    engine.shutdown(5)
    assert type(engine.runner.model.base_model.layers[0]).__name__ != "ServedBlock"


@pytest.mark.parametrize(
    "kind, options, targets",
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_size": 44, "intermediate_size": 77}, "k"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "down"),
        ("qwen3", {"num_key_value_heads": 4, "head_dim": 6, "tie_word_embeddings": True}, "head"),
    ],
)
def test_odd_models_and_adapters_for_few_linears(kind, options, targets, tokenizer, tmp_path):
    write(tmp_path / "a", 1, targets=targets, model=tiny(kind, **options))
    alone = Alone(tokenizer, {"a": tmp_path / "a"}, tiny(kind, **options))
    engine, _ = engine_of(tokenizer, tmp_path, tiny(kind, **options), GraphEngine, "a", slots=4)
    stacks = [(), (("a", 1.0),), (("a", 0.0),), (("a", -0.7),)]
    asked = [(stack, ask(engine, "which of them answers this", 14, stack)) for stack in stacks]
    assert engine.runner.fused
    for stack, ticket in asked:
        assert read(ticket) == alone(stack, "which of them answers this", 14)
    engine.shutdown(5)


def test_llama_has_no_window_whatever_its_config_says(tokenizer, tmp_path):
    model = tiny("llama", sliding_window=9)
    ids = torch.arange(30, 60)
    wanted = model(ids[None], use_cache=False).logits[0, -1]
    engine, _ = engine_of(tokenizer, tmp_path, model, GraphEngine)
    got = engine.runner.prompts([(0, 0, ids.tolist(), ())], [True])[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    engine.shutdown(5)


@pytest.mark.parametrize("kind, options", [("gemma", {}), ("llama", {"hidden_act": "gelu"}), ("olmo2", {})])
def test_another_kind_of_block_is_the_models_own(kind, options, tokenizer, tmp_path):
    write(tmp_path / "a", 1, model=tiny(kind, **options))
    alone = Alone(tokenizer, {"a": tmp_path / "a"}, tiny(kind, **options))
    engine, _ = engine_of(tokenizer, tmp_path, tiny(kind, **options), GraphEngine, "a")
    assert not engine.runner.fused
    for stack in ((), (("a", 1.0),)):
        assert read(ask(engine, "as it is", 8, stack)) == alone(stack, "as it is", 8)
    engine.shutdown(5)


def test_rows_without_an_adapter_are_bit_equal_to_the_base(tokenizer, tmp_path):
    write(tmp_path / "a", 1)
    engine, _ = engine_of(tokenizer, tmp_path, tiny_llama(), GraphEngine, "a", slots=4)
    read(ask(engine, "warm", 2, [("a", 1.0)]))
    rows = [(0, 5, 7, ()), (1, 5, 8, ((0, 1.0),)), (2, 5, 9, ())]
    mixed = engine.runner.tokens(rows).clone()
    plain = engine.runner.tokens([(slot, at, token, ()) for slot, at, token, _ in rows]).clone()
    assert engine.runner.fused and torch.equal(mixed[[0, 2]], plain[[0, 2]]) and not torch.equal(mixed[1], plain[1])
    engine.shutdown(5)


@pytest.mark.parametrize("uses", [(), ((0, 0.7), (1, -0.3))])
def test_a_pass_that_fails_leaves_nothing_for_the_next(uses, tokenizer, tmp_path, monkeypatch):
    """Not even for one that takes the model's own blocks."""
    write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    engine, _ = engine_of(tokenizer, tmp_path, kind=GraphEngine, adapters="ab")
    read(ask(engine, "both", 2, (("a", 1.0), ("b", 1.0))))
    last, run = engine.runner.model.base_model.layers[-1], engine.runner.prompts
    wanted = run([(0, 0, [5, 6, 7], uses)], [True]).clone()
    with monkeypatch.context() as patch:
        patch.setattr(last, "_mlp", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([(1, 0, [8, 9], ())], [True])
    assert last.flow.y is not None and torch.equal(run([(0, 0, [5, 6, 7], uses)], [True]), wanted)
    engine.shutdown(5)


def test_linears_of_one_input_are_one_product_and_get_their_weights_back(tokenizer, tmp_path):
    """Where they are plain: on the CPU, in another dtype than the float32 that is packed."""
    model = tiny("qwen2").bfloat16()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    engine, _ = engine_of(tokenizer, tmp_path, model, GraphEngine)
    attention = engine.runner.model.base_model.layers[1].layer.self_attn
    assert len({part.weight.untyped_storage().data_ptr() for part in (attention.q_proj, attention.k_proj)}) == 1
    assert read(ask(engine, "in one product", 6))[1] == 6
    engine.shutdown(5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.untyped_storage().nbytes() == parameter.nbytes, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_of_torchao_are_served_as_they_are(dtype, tokenizer, tmp_path):
    """They are of torch's own class, with weights of another."""
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny("llama").to(dtype)
    torchao.quantize_(model.model.layers, torchao.Int8WeightOnlyConfig())
    kinds = {name: type(parameter) for name, parameter in model.named_parameters()}
    engine, _ = engine_of(tokenizer, tmp_path, model, GraphEngine)
    assert engine.runner.fused and read(ask(engine, "eight bits", 6))[1] == 6
    engine.shutdown(5)
    assert {name: type(parameter) for name, parameter in model.named_parameters()} == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_that_fails_half_way_leaves_the_model_as_it_was(dtype, tokenizer, tmp_path, monkeypatch):
    model = tiny("llama").to(dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    kinds, joined = {name: type(module) for name, module in model.named_modules()}, []

    def join(products):
        joined.append(Products.join.own(products))
        if len(joined) == 6:
            raise torch.OutOfMemoryError

    join.own = Products.join
    monkeypatch.setattr(Products, "join", join)
    with pytest.raises(torch.OutOfMemoryError):
        engine_of(tokenizer, tmp_path, model, GraphEngine)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.untyped_storage().nbytes() == parameter.nbytes, name
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_served_block_has_what_a_model_asks_its_blocks_for(tokenizer, tmp_path):
    model = tiny("qwen2")
    model.base_model.layers[
        0
    ].attention_type = "full_attention"  # as all have in transformers 5.0, whose model reads it
    engine, _ = engine_of(tokenizer, tmp_path, model, GraphEngine)
    block = model.base_model.layers[0]
    assert type(block).__name__ == "ServedBlock" and block.attention_type == "full_attention"
    assert not hasattr(block, "nothing_of_the_kind")
    engine.shutdown(5)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), adapters=st.integers(1, 70), data=st.data())
def test_a_step_is_dealt_into_as_few_tiles_as_have_room(rows, adapters, data):
    """Or into single rows; those without an adapter, and padding, count too."""
    places = data.draw(st.lists(st.one_of(st.none(), st.integers(0, adapters - 1)), min_size=1, max_size=rows))
    tilings = GraphRunner._tilings(SimpleNamespace(fused=True), StaticRows, rows, 1)
    count, size = dealt(tilings, rows, [place for place in places if place is not None])
    padded = [[] if place is None else [place] for place in places] + [[]] * (rows - len(places))
    tiles = torch.tensor(served.tile_rows(padded, 1, size, count)).view(1, count, 1 + size)
    assert served.places_of(tiles, rows).flatten().tolist() == [own[0] if own else -1 for own in padded]
    for fewer, most in tilings[: tilings.index((count, size))]:
        with pytest.raises(ValueError, match="room for"):
            served.tile_rows(padded, 1, most, fewer)


def test_programs_have_a_power_of_two_of_warps():
    """Whatever the width of a head: triton takes no other number."""
    numbers = {served_block._warps(tile, width) for tile in (1, 16, 32) for width in range(2, 514, 2)}
    assert all(n & (n - 1) == 0 for n in numbers) and 1 in numbers


@pytest.mark.parametrize("size", [1, 16])
def test_float16_has_room_for_what_is_not_normed_yet(size):
    check_range("cpu", size)


def test_a_served_model_that_is_called_without_a_batch_says_so(tokenizer, tmp_path):
    engine, _ = engine_of(tokenizer, tmp_path, kind=GraphEngine)
    with pytest.raises(BaseModelError, match="attention"):
        engine.runner.model(torch.tensor([[1, 2]]))
    engine.shutdown(5)


INTERPRETED = """
import torch
from block_checks import bounds, check_base_rows, check_block, check_range
from veneer.kernels import served, served_attention, served_block

served.range = served_attention.range = served_block.range = bounds
assert served._runs(torch.empty(1))
for size in (1, 16, 32):
    check_block(1e-5, torch.float32, "cpu", size, rows=9)
check_block(1e-5, torch.float32, "cpu", 16, rows=5, D=300, I=530, rank=64, heads=(1, 2, 80))
check_block(4e-3, torch.float16, "cpu", 16, rows=18)
for size in (1, 16):
    check_base_rows(torch.float32, "cpu", size, rows=9)
    check_range("cpu", size)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_of_a_served_block_interpreted(monkeypatch):
    """In float32 and float16: the interpreter has no products of bfloat16."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", ":".join([*sys.path, str(__file__).rsplit("/", 1)[0]]))
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, timeout=600)

"""Weights packed for few rows: the same products, and the same model once it is no longer served."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.served import Alone, ask, engine_of, read, write
from transformers import AutoModelForCausalLM

from conftest import CORPUS, tiny_llama
from veneer.serve import packed
from veneer.serve.packed import PackedLinear, packable

needs_packing = pytest.mark.skipif(not packed.can_pack(), reason="this torch cannot pack weights here")
sizes = st.integers(1, 70)


@needs_packing
@settings(deadline=None, max_examples=30)
@given(rows=sizes, d_in=sizes, d_out=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_packed_products_are_their_definition_and_weights_come_back(rows, d_in, d_out, bias, seed):
    draw = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, rows, d_in, generator=draw), torch.randn(d_out, d_in, generator=draw)
    b = torch.randn(d_out, generator=draw) if bias else None
    own = packed.pack(weight)
    truth = F.linear(x.double(), weight.double(), None if b is None else b.double())
    naive = (F.linear(x, weight, b) - truth).abs().max()
    assert (packed.linear(x, own, b) - truth).abs().max() <= naive + 1e-5 * truth.abs().max()
    assert torch.equal(own.to_dense(), weight)


def test_products_are_of_few_numbers_of_rows():
    """Each number that was ever seen costs memory; rows that only fill up cost time."""
    found = [packed.filled(rows) for rows in range(1, 4097)]
    assert all(rows <= filled <= 1.125 * rows for rows, filled in enumerate(found, 1))
    assert found[:16] == list(range(1, 17)) and len(set(found)) == 16 + 8 * 8


@needs_packing
@pytest.mark.parametrize("tied", [True, False])
def test_a_served_model_is_packed_and_put_back(tokenizer, tmp_path, tied):
    write(tmp_path / "a", 1, model=tiny_llama(tie_word_embeddings=tied))
    model = tiny_llama(tie_word_embeddings=tied)
    before, kinds = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    engine, _ = engine_of(tokenizer, tmp_path, model, adapters="a")
    packs = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packs) == sum(kind is torch.nn.Linear for kind in kinds) and sum(p.shared for p in packs) == tied
    assert all(p.plain.weight.numel() == 0 for p in packs if not p.shared)
    alone = Alone(tokenizer, {"a": tmp_path / "a"}, tiny_llama(tie_word_embeddings=tied))
    for stack in ((), (("a", 1.0),)):
        assert read(ask(engine, CORPUS[0], 9, stack)) == alone(stack, CORPUS[0], 9)
    engine.shutdown(5)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@needs_packing
@pytest.mark.skipif(not psutil.LINUX, reason="no list of mapped files")
def test_a_packed_model_does_not_hold_the_file_that_it_came_from(tokenizer, tmp_path):
    """A mapped file's pages would stay in memory beside the packed copies."""
    (tmp_path / "base").mkdir()
    tiny_llama(hidden_size=384, intermediate_size=1024).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval().requires_grad_(False)

    def mapped():
        return any(str(tmp_path) in part.path for part in psutil.Process().memory_maps())

    assert mapped()
    engine, _ = engine_of(tokenizer, tmp_path, model)
    gc.collect()
    assert not mapped()
    engine.shutdown(5)


def test_what_cannot_be_packed_is_served_as_it_is(tokenizer, tmp_path, monkeypatch):
    broken = lambda x, own, bias=None: F.linear(x, own.to_dense(), bias) + 1  # noqa: E731
    monkeypatch.setattr(packed, "linear", broken)
    assert not packed.can_pack()
    write(tmp_path / "a", 1)
    model = tiny_llama()
    engine, _ = engine_of(tokenizer, tmp_path, model, adapters="a")
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert read(ask(engine, CORPUS[0], 9)) == Alone(tokenizer, {"a": tmp_path / "a"})((), CORPUS[0], 9)
    engine.shutdown(5)


@needs_packing
def test_only_plain_float32_linears_are_packed_and_shared_ones_where_memory_is(monkeypatch):
    assert not packable(tiny_llama().bfloat16())
    assert "lm_head" in packable(tiny_llama(tie_word_embeddings=True))
    monkeypatch.setattr(packed, "SPARE", 10**12)
    left = packable(tiny_llama(tie_word_embeddings=True))
    assert left and "lm_head" not in left

"""Truncating, comparing and extracting adapters on files, against dense float64 references."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import veneer
from conftest import tiny_llama
from veneer.adapter.algebra import factors
from veneer.errors import AdapterFormatError, AdapterStateError, BaseModelError, ConfigError, WrongBaseError
from veneer.formats import extract as extracting
from veneer.formats.adapter_file import Factors
from veneer.formats.extract import low_rank
from veneer.formats.resize import _compare, rank_for


def saved(model, path, seed=0, noise=0.2, **config):
    bank = veneer.attach(model, veneer.AdapterConfig(**{"alpha": 5} | config), seed=seed)
    torch.manual_seed(seed)
    for parameter in bank.parameters("default").values():
        parameter.data += noise * torch.randn_like(parameter)
    return veneer.save_adapter(model, path)


def deltas(model):
    return {name: layer.delta("default").detach().double() for name, layer in veneer.get_bank(model).layers.items()}


def loaded(path, **options):
    model = tiny_llama()
    veneer.load_adapter(model, path, **options)
    return model


CASES = {
    "pissa, patterns": {"init": "pissa", "rank": 3, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 2}},
    "olora, rslora": {"init": "olora", "rank": 4, "rslora": True, "modules_to_save": ["model.norm"]},
    "embedding": {"rank": 6, "target_modules": ["embed_tokens", "q_proj"], "tied_head": "embedding"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))
def test_a_resized_adapter_has_the_error_it_shows_and_loads_in_both(options, tmp_path):
    model = tiny_llama()
    path = saved(model, tmp_path / "a", **options)
    before, whole = {f.name: f.read_bytes() for f in path.iterdir()}, deltas(model)
    found = veneer.resize(path, tmp_path / "b", rank=4)
    small = loaded(tmp_path / "b")
    assert max(veneer.get_bank(small).layers[name].rank["default"] for name in whole) == 4
    for name, change in deltas(small).items():
        u, s, vh = torch.linalg.svd(whole[name] if whole[name].shape[0] < 400 else whole[name].t(), full_matrices=False)
        best = s[4:].norm() / s.norm()
        assert found.errors[name] == pytest.approx(float((change - whole[name]).norm() / whole[name].norm()), abs=1e-5)
        assert found.errors[name] == pytest.approx(float(best), abs=1e-5)
    total = sum((d - whole[n]).square().sum() for n, d in deltas(small).items()) / sum(
        d.square().sum() for d in whole.values()
    )
    assert found.error == pytest.approx(float(total.sqrt()), rel=1e-3) and found.error > 0.01
    ids = torch.tensor([[5, 9, 40, 3]])
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, small(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before


@pytest.mark.parametrize("per_layer", [False, True])
def test_energy_chooses_the_smallest_rank_that_keeps_it(per_layer, tmp_path):
    model = tiny_llama()
    path = saved(model, tmp_path / "a", rank=8, target_modules="all-linear")
    whole = deltas(model)
    found = veneer.resize(path, tmp_path / "b", energy=0.8, per_layer=per_layer)
    spectra = {name: torch.linalg.svdvals(d).square() for name, d in whole.items()}
    ranks = {name: after for name, (_, after) in found.ranks.items()}

    def kept(names, less=0):
        parts = [spectra[name][: ranks[name] - less].sum() for name in names]
        return float(sum(parts) / sum(spectra[name].sum() for name in names))

    for names in [[name] for name in whole] if per_layer else [list(whole)]:
        assert kept(names) >= 0.8 > kept(names, 1)
    assert (len(set(ranks.values())) > 1) == per_layer and found.error <= math.sqrt(0.2) + 1e-6
    assert {n: layer.rank["default"] for n, layer in veneer.get_bank(loaded(tmp_path / "b")).layers.items()} == ranks
    limited = veneer.resize(path, tmp_path / "c", energy=0.8, per_layer=per_layer, rank=2)
    assert max(after for _, after in limited.ranks.values()) == 2


def test_rank_for():
    squares = torch.tensor([9.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    assert [rank_for(squares, e) for e in (0.1, 9 / 16, 0.6, 15 / 16, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert rank_for(torch.zeros(3), 0.5) == 1


def test_what_cannot_be_resized_is_refused(tmp_path):
    path = saved(tiny_llama(), tmp_path / "a", rank=4, dora=True)
    with pytest.raises(AdapterFormatError, match="use_dora"):
        veneer.resize(path, tmp_path / "b", rank=2)
    plain = saved(tiny_llama(), tmp_path / "p", rank=4)
    with pytest.raises(AdapterStateError, match="not empty"):
        veneer.resize(plain, path, rank=2)
    for wrong in ({}, {"rank": 0}, {"energy": 1.5}, {"rank": 2, "per_layer": True}):
        with pytest.raises(ConfigError):
            veneer.resize(plain, tmp_path / "b", **wrong)
    assert not (tmp_path / "b").exists()


@given(ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 99), shared=st.booleans())
@settings(max_examples=40, deadline=None)
def test_comparison_is_that_of_dense_updates(ranks, seed, shared):
    torch.manual_seed(seed)
    one, two = (Factors(torch.randn(r, 11), torch.randn(7, r), s) for r, s in zip(ranks, (0.5, -3.0)))
    if shared:
        two = Factors(one.lora_A.clone(), torch.randn(7, ranks[0]), 2.0)
    found = _compare("x", one, two)
    a, b = (f.scaling * f.lora_B.double() @ f.lora_A.double() for f in (one, two))
    assert found.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-9)
    assert found.distance == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-9)
    assert (found.norm_a, found.norm_b) == pytest.approx((float(a.norm()), float(b.norm())))
    spaces = []
    for dense, f in ((a, one), (b, two)):
        u, _, vh = torch.linalg.svd(dense, full_matrices=False)
        spaces.append((u[:, : f.rank], vh[: f.rank].t()))
    smaller = min(one.rank, two.rank)
    for i, value in ((0, found.outputs), (1, found.inputs)):
        assert value == pytest.approx(float((spaces[0][i].t() @ spaces[1][i]).square().sum()) / smaller, abs=1e-6)
    if shared:
        assert found.inputs == pytest.approx(1.0)


def test_diff_of_files(tmp_path):
    one = saved(tiny_llama(), tmp_path / "a", rank=3, target_modules=["q_proj", "v_proj"])
    two = saved(tiny_llama(), tmp_path / "b", seed=1, rank=5, target_modules=["q_proj", "down_proj"])
    same = veneer.diff(one, one)
    assert same.cosine == pytest.approx(1) and same.distance < 1e-12 and not (same.only_a or same.only_b or same.other)
    assert all(x.cosine == pytest.approx(1) and x.inputs == pytest.approx(1) for x in same.layers)
    found = veneer.diff(one, two)
    assert [len(found.layers), len(found.only_a), len(found.only_b)] == [2, 2, 2]
    a, b = deltas(loaded(one)), deltas(loaded(two))
    flat = [torch.cat([d.get(n, torch.zeros_like({**a, **b}[n])).flatten() for n in {**a, **b}]) for d in (a, b)]
    assert found.cosine == pytest.approx(float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()), abs=1e-6)
    assert found.distance == pytest.approx(float((flat[0] - flat[1]).norm() / flat[0].norm()), rel=1e-5)
    other = saved(tiny_llama(seed=3), tmp_path / "c", rank=3, target_modules=["q_proj", "v_proj"])
    with pytest.raises(WrongBaseError):
        veneer.diff(one, other)
    json.dumps(veneer.diff(one, other, force=True).as_dict())


def tuned_pair(tmp_path, make=tiny_llama, rank=2, dtype=torch.float32):
    """A base, and the same with low-rank changes of its linears, a norm and the embedding; sharded."""
    base, tuned = make().to(dtype), make().to(dtype)
    torch.manual_seed(5)
    for name, parameter in tuned.named_parameters():
        if name.endswith("proj.weight") and "layers.0.mlp.up" not in name or "c_attn.weight" in name:
            parameter.data += 0.05 * (torch.randn(len(parameter), rank) @ torch.randn(rank, parameter.shape[1])).to(
                dtype
            )
        elif "norm.weight" in name and "layers" not in name or "embed_tokens" in name or "c_attn.bias" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="50KB")
    return base, tuned


@pytest.mark.parametrize("tie", [True, False])
def test_what_was_low_rank_is_extracted_whole(tie, tmp_path):
    def make():
        return tiny_llama(tie_word_embeddings=tie)

    base, tuned = tuned_pair(tmp_path, make)
    found = veneer.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", energy=0.9999999, save_modules=True)
    assert set(found.ranks.values()) == {2} and found.error < 1e-4 and found.unchanged == 1 + (not tie)
    assert len(found.kept) == 2 and not found.left
    model = make()
    veneer.load_adapter(model, tmp_path / "out")
    ids = torch.tensor([[5, 9, 40, 3]])
    with torch.no_grad():
        wanted = tuned(input_ids=ids).logits
        assert (wanted - base(input_ids=ids).logits).abs().max() > 0.1
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-4)
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "out").eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-4)
    left = veneer.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "linear", rank=1)
    assert set(left.ranks.values()) == {1} and len(left.left) == 2 and not left.kept
    veneer.load_adapter(tiny_llama(tie_word_embeddings=tie), tmp_path / "linear")
    change = (tuned.model.layers[1].mlp.down_proj.weight - base.model.layers[1].mlp.down_proj.weight).double()
    s = torch.linalg.svdvals(change)
    assert left.errors["model.layers.1.mlp.down_proj"] == pytest.approx(float(s[1:].norm() / s.norm()), abs=1e-4)


def test_conv1d_and_biases_in_bfloat16(tmp_path):
    from formats.test_merge_stream import gpt2

    base, tuned = tuned_pair(tmp_path, gpt2, dtype=torch.bfloat16)
    found = veneer.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=20, save_modules=True)
    assert len(found.ranks) == 6 and len(found.kept) == 2 and found.unchanged == 2
    model = gpt2()
    model.load_state_dict(base.float().state_dict())
    veneer.load_adapter(model, tmp_path / "out")
    for i, block in enumerate(model.transformer.h):
        wanted, was = (m.transformer.h[i].attn.c_attn for m in (tuned.float(), base))
        change = wanted.weight - was.weight
        error = (block.attn.c_attn.delta("default").t() - change).norm() / change.norm()
        assert float(error) == pytest.approx(found.errors[f"transformer.h.{i}.attn.c_attn"], rel=1e-3)
        assert torch.equal(block.attn.c_attn.bias.float(), wanted.bias)


def test_extract_refusals(tmp_path):
    tuned_pair(tmp_path)
    with pytest.raises(BaseModelError, match="nothing to extract"):
        veneer.extract(tmp_path / "base", tmp_path / "base", tmp_path / "out", rank=2)
    tiny_llama(intermediate_size=56).save_pretrained(tmp_path / "wider")
    with pytest.raises(BaseModelError, match="name its own base"):
        veneer.extract(tmp_path / "wider", tmp_path / "base", tmp_path / "out", rank=2)
    with pytest.raises(ConfigError, match="how small"):
        veneer.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_randomised_svd_is_as_good_as_the_exact_one(monkeypatch):
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 200)).Q for n in (300, 260))
    change = (u * 0.9 ** torch.arange(200)) @ v.t()
    wanted = {}
    for exact in (True, False):
        monkeypatch.setattr(extracting, "EXACT", 10**6 if exact else 0)
        monkeypatch.setattr(extracting, "OVERSAMPLING", 8)
        for rank, energy in ((12, None), (None, 0.99), (30, 0.999999), (5, 0.5)):
            lora_A, lora_B = low_rank(change, rank, energy)
            got = len(lora_A), float((change - lora_B @ lora_A).norm())
            size, error = wanted.setdefault((rank, energy), got)
            assert got[0] == size and got[1] == pytest.approx(error, rel=1e-3)
    best = factors.truncate((change, torch.eye(300)), 12)
    assert wanted[12, None][1] == pytest.approx(float((change.double() - best[1] @ best[0]).norm()), rel=1e-4)

"""Reducing a saved adapter's rank: the best factors, the error it shows, and the file."""

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import veneer
from conftest import tiny_llama
from veneer.errors import AdapterFormatError, ConfigError
from veneer.formats.reduced import truncate


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 9), old=st.integers(1, 9), seed=st.integers(0, 99))
def test_truncated_factors_are_the_best_of_their_rank(rank, old, seed):
    torch.manual_seed(seed)
    lora_A, lora_B = torch.randn(old, 11), torch.randn(7, old)
    small_A, small_B, lost, whole = truncate(lora_A, lora_B, min(rank, old, 7))
    dense = lora_B.double() @ lora_A.double()
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    torch.testing.assert_close(small_B @ small_A, best)
    assert lost == pytest.approx(float((dense - best).square().sum()), abs=1e-9)
    assert whole == pytest.approx(float(dense.square().sum()))


def deltas(model):
    bank = veneer.get_bank(model)
    return {name: layer.delta("default") for name, layer in bank.layers.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"init": "pissa", "rank": 3, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 2}},
        {"init": "olora", "rank": 4, "rslora": True, "modules_to_save": ["model.norm"]},
        {"rank": 6, "target_modules": ["embed_tokens", "q_proj"], "tied_head": "embedding", "trainable_tokens": None},
    ],
    ids=["pissa, patterns", "olora, rslora", "embedding"],
)
def test_a_reduced_adapter_has_the_error_it_shows_and_loads_in_both(options, tmp_path):
    model = tiny_llama()
    bank = veneer.attach(model, veneer.AdapterConfig(alpha=5, **options), seed=0)
    for parameter in bank.parameters("default").values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    whole = deltas(model)
    found = veneer.reduce_adapter(veneer.save_adapter(model, tmp_path / "a"), tmp_path / "b", 4)
    small = tiny_llama()
    veneer.load_adapter(small, tmp_path / "b")
    assert max(veneer.get_bank(small).layers[name].rank["default"] for name in whole) == 4
    lost = {name: change - whole[name] for name, change in deltas(small).items()}
    for name, error in found.errors.items():
        assert error == pytest.approx(float(lost[name].norm() / whole[name].norm()), rel=1e-3)
    total = sum(d.square().sum() for d in lost.values()) / sum(d.square().sum() for d in whole.values())
    assert found.total == pytest.approx(float(total.sqrt()), rel=1e-3) and found.total > 0.01
    ids = torch.tensor([[5, 9, 40, 3]])
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, small(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_reduced_is_refused(tmp_path):
    model = tiny_llama()
    veneer.attach(model, veneer.AdapterConfig(rank=4, dora=True))
    path = veneer.save_adapter(model, tmp_path / "a")
    with pytest.raises(AdapterFormatError, match="use_dora"):
        veneer.reduce_adapter(path, tmp_path / "b", 2)
    with pytest.raises(ConfigError, match="exists"):
        veneer.reduce_adapter(path, path, 2)
    assert not (tmp_path / "b").exists()

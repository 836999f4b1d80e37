"""attach, detach, targets, the bank: behaviour on plain trees and on transformers models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import veneer
from conftest import tiny_llama
from veneer.adapter.layers import AdaptedLinear
from veneer.errors import AdapterStateError, ConfigError, TargetError

SMALL = veneer.AdapterConfig(rank=4)


def tree():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6, bias=False))


def randomise(bank, name="default"):
    for p in bank.parameters(name).values():
        p.data.normal_()


def logits(model, ids=((3, 5, 8, 13, 21),)):
    return model(input_ids=torch.tensor(ids)).logits


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_a_fresh_adapter_changes_nothing(init):
    model, x = tree(), torch.randn(3, 8)
    before = model(x)
    veneer.attach(model, veneer.AdapterConfig(rank=4, init=init))
    torch.testing.assert_close(model(x), before, rtol=0, atol=0 if init != "orthogonal" else 1e-5)


def test_forward_is_the_formula_and_detach_restores_the_base_and_its_flags():
    model, x = tree(), torch.randn(3, 8)
    model[0].weight.requires_grad_(False)
    before, modules = model(x), list(model)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, alpha=3, rslora=True))
    randomise(bank)
    a0, b0, a2, b2 = bank.parameters("default").values()
    s = 3 / math.sqrt(4)
    h = torch.relu(modules[0](x) + s * x @ a0.T @ b0.T)
    torch.testing.assert_close(model(x), modules[2](h) + s * h @ a2.T @ b2.T, rtol=1e-4, atol=1e-4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    veneer.detach(model)
    assert list(model) == modules and torch.equal(model(x), before)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True]


def test_first_step_gradient_of_A_is_zero_and_of_B_is_not(llama):
    bank = veneer.attach(llama, veneer.AdapterConfig(rank=4))
    logits(llama).square().sum().backward()
    for name, p in bank.parameters("default").items():
        assert (p.grad == 0).all() == name.endswith("lora_A"), name
    assert all(p.grad is None for n, p in llama.named_parameters() if "lora_" not in n)


def test_all_linear_leaves_the_head_alone(llama):
    bank = veneer.attach(llama, veneer.AdapterConfig(rank=4))
    assert len(bank.layers) == 14 and "lm_head" not in bank.layers


@pytest.mark.parametrize(
    "targets,count", [("attention", 8), ("mlp", 6), (["q_proj", "layers.1.mlp.up_proj"], 3), (r".*layers\.0\..*", 7)]
)
def test_target_forms(llama, targets, count):
    assert len(veneer.attach(llama, veneer.AdapterConfig(rank=4, target_modules=targets)).layers) == count


def test_layers_exclude_and_patterns(llama):
    config = veneer.AdapterConfig(
        rank=4,
        alpha=8,
        layers=[1],
        exclude_modules=["down_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={r".*mlp\..*": 6},
    )
    bank = veneer.attach(llama, config)
    assert {n.rsplit(".", 1)[1] for n in bank.layers} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
    }
    assert all(n.startswith("model.layers.1.") for n in bank.layers)
    scaling = {n.rsplit(".", 1)[1]: layer.scaling["default"] for n, layer in bank.layers.items()}
    assert scaling["q_proj"] == 4 and scaling["k_proj"] == 2 and scaling["up_proj"] == 1.5


@pytest.mark.parametrize(
    "options,words",
    [
        ({"target_modules": ["q_prj"]}, "q_prj.*near misses: q_proj"),
        ({"target_modules": "q_proj"}, r'write a list: \["q_proj"\]'),
        ({"target_modules": ["embed_tokens"]}, "shares its weight with the output head.*tied_head: both"),
        ({"target_modules": ["input_layernorm"]}, "a LlamaRMSNorm, which cannot be adapted"),
        ({"target_modules": "(("}, "not a regular expression"),
        ({"exclude_modules": ["nothing"]}, "excludes nothing"),
        ({"layers": [7]}, r"layers \[7\].*0 to 1"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern key 'q_prj' matches no adapted module.*q_proj"),
        ({"alpha_pattern": {"zzz": 2}}, "alpha_pattern key 'zzz'"),
        ({"rank": 37}, "rank 37 is above.*use at most 36"),
        ({"modules_to_save": ["lm_hed"]}, "modules_to_save 'lm_hed' matches nothing.*lm_head"),
        ({"modules_to_save": ["embed_tokens"]}, "shares its weight with lm_head"),
        ({"modules_to_save": ["q_proj"]}, "in modules_to_save and in target_modules"),
        ({"bias": "all"}, "the model has no bias"),
        ({"rank": 5, "init": "orthogonal"}, "even rank"),
    ],
)
def test_mistakes_say_what_to_do_and_change_nothing(llama, options, words):
    before = [(n, p.requires_grad) for n, p in llama.named_parameters()]
    with pytest.raises((TargetError, ConfigError), match=words):
        veneer.attach(llama, veneer.AdapterConfig(**{"rank": 2} | options))
    assert before == [(n, p.requires_grad) for n, p in llama.named_parameters()]
    assert not any(isinstance(m, AdaptedLinear) for m in llama.modules())


def test_names_are_checked(llama):
    veneer.attach(llama, SMALL, name="one")
    with pytest.raises(AdapterStateError, match="already has an adapter 'one'"):
        veneer.attach(llama, SMALL, name="one")
    with pytest.raises(AdapterStateError, match="letters, digits"):
        veneer.attach(llama, SMALL, name="a.b")
    with pytest.raises(AdapterStateError, match="no adapter is attached"):
        veneer.detach(tree())


def test_a_peft_model_is_refused(llama):
    import peft

    wrapped = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterStateError, match="PEFT"):
        veneer.attach(wrapped, SMALL)


def test_a_shared_module_is_adapted_once_at_both_places():
    linear = nn.Linear(5, 5)
    model, x = nn.Sequential(linear, nn.Tanh(), linear), torch.randn(2, 5)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2))
    assert len(bank.layers) == 1 and model[0] is model[2]
    veneer.detach(model)
    assert model[0] is linear and model[2] is linear and model(x).shape == (2, 5)


def test_stack_route_disable_and_remove(llama):
    base = logits(llama)
    bank = veneer.attach(llama, veneer.AdapterConfig(rank=2, target_modules=["q_proj"]), name="one")
    veneer.attach(llama, veneer.AdapterConfig(rank=3, target_modules=["q_proj", "up_proj"], alpha=5), name="two")
    randomise(bank, "one"), randomise(bank, "two")
    single = {}
    for name in bank.names:
        bank.activate(name)
        single[name] = logits(llama)
    bank.activate({"one": 0.5, "two": -2.0})
    stacked = logits(llama)
    merged = tiny_llama()
    with torch.no_grad():
        for path, layer in bank.layers.items():
            weight = merged.get_submodule(path).weight
            weight += sum(w * layer.delta(n) for n, w in {"one": 0.5, "two": -2.0}.items() if n in layer.lora_A)
    torch.testing.assert_close(stacked, logits(merged), rtol=1e-4, atol=1e-5)
    ids = ((3, 5, 8),) * 4
    with bank.route(["two", None, "one", "two"]):
        rows = logits(llama, ids)
    for row, expected in zip(rows, (single["two"], base, single["one"], single["two"])):
        torch.testing.assert_close(row, expected[0, :3], rtol=1e-4, atol=1e-5)
    assert torch.equal(rows[1], logits_of_base(bank, ids)[1])
    with bank.disabled():
        assert torch.equal(logits(llama), base)
    assert bank.active == {"one": 0.5, "two": -2.0}
    bank.remove("two")
    bank.activate("one")
    torch.testing.assert_close(logits(llama), single["one"])
    with pytest.raises(AdapterStateError, match="no adapter 'two'.*one"):
        bank.activate("two")
    for wrong, says in ((["one"], "takes a name"), ({"one": float("nan")}, "finite"), ({"one": "0.5"}, "finite")):
        with pytest.raises(AdapterStateError, match=says):
            bank.activate(wrong)
    assert bank.active == {"one": 1.0}


def logits_of_base(bank, ids):
    with bank.disabled():
        return logits(bank.model, ids)


def test_biases_and_whole_modules_come_and_go_with_the_adapter():
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    base = logits(model)
    config = veneer.AdapterConfig(rank=2, target_modules=["q_proj"], bias="all", modules_to_save=["lm_head"])
    bank = veneer.attach(model, config)
    randomise(bank)
    changed = logits(model)
    assert not torch.allclose(changed, base)
    with bank.disabled():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), changed)
    with pytest.raises(AdapterStateError, match="cannot be stacked or weighted"):
        bank.activate({"default": 0.5})
    veneer.detach(model)
    assert torch.equal(logits(model), base)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_report_counts(llama):
    bank = veneer.attach(llama, veneer.AdapterConfig(rank=4, target_modules=["q_proj", "down_proj"]))
    r = bank.report()
    wanted = 2 * 4 * ((36 + 36) + (52 + 36))
    assert r.trainable_parameters == wanted and r.bytes == 4 * wanted
    assert r.total_parameters == wanted + sum(p.numel() for p in tiny_llama().parameters())
    assert {t["name"]: (t["d_out"], t["d_in"]) for t in r.targets} == {"q_proj": (36, 36), "down_proj": (36, 52)}
    assert "2 of" not in str(r) and f"{wanted:,}" in str(r)


def test_dropout_acts_in_training_only():
    model, x = tree(), torch.ones(64, 8)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, dropout=0.5))
    randomise(bank)
    model.eval()
    assert torch.equal(model(x), model(x))
    assert not any(module.training for module in model.modules())
    veneer.attach(model, veneer.AdapterConfig(rank=4, dropout=0.5), name="late")
    assert not any(module.training for module in model.modules())
    bank.activate("default")
    model.train()
    assert not torch.equal(model(x), model(x))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert torch.equal(model(x), model(x))


def test_seed_makes_the_factors(llama):
    one, two, other = (veneer.attach(tiny_llama(), SMALL, seed=s).parameters("default") for s in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one) and not all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_float32_over_a_low_precision_base_and_merging_rounds_once(dtype):
    base = nn.Linear(9, 7).to(dtype)
    model = nn.Sequential(base)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=3))
    randomise(bank)
    layer = bank.layers["0"]
    assert layer.lora_A["default"].dtype == torch.float32 and model(torch.randn(2, 9, dtype=dtype)).dtype == dtype
    merged = layer.merged({"default": 0.5})
    torch.testing.assert_close(
        merged.weight, (base.weight.float() + 0.5 * layer.delta("default")).to(dtype), rtol=0, atol=0
    )
    assert torch.equal(merged.bias, base.bias)


@settings(max_examples=25, deadline=None)
@given(
    d_in=st.integers(1, 12),
    d_out=st.integers(1, 12),
    rank=st.integers(1, 12),
    alpha=st.floats(0.1, 50),
    rslora=st.booleans(),
    weight=st.floats(-2, 2),
)
def test_live_and_merged_agree_for_any_shape(d_in, d_out, rank, alpha, rslora, weight):
    model = nn.Sequential(nn.Linear(d_in, d_out))
    config = veneer.AdapterConfig(rank=min(rank, d_in, d_out), alpha=alpha, rslora=rslora)
    bank = veneer.attach(model, config, seed=0)
    randomise(bank)
    bank.activate({"default": weight})
    x = torch.randn(4, d_in)
    torch.testing.assert_close(model(x), bank.layers["0"].merged({"default": weight})(x), rtol=1e-3, atol=1e-3)

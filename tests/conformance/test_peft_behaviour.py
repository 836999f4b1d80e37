"""PEFT's own behaviours on models outside transformers, as Veneer must show them.

The list follows PEFT 0.21's test_custom_models.py and test_initialization.py; the tests are Veneer's own. `TOYS` brings
one model for each kind of layer (Linear, Conv1D, Embedding, Conv1d/2d/3d, MultiheadAttention).
"""

from __future__ import annotations

import copy

import pytest
import torch
from conformance.compare import relative
from conformance.toys import TOY, TOYS, Toy
from safetensors.torch import load_file
from torch import nn

import veneer
from veneer.errors import AdapterStateError, TargetError

MERGEABLE = [toy for toy in TOYS if toy.name != "Conv2d in groups"]
mergeable_toy = pytest.mark.parametrize("toy", MERGEABLE, ids=lambda t: t.name.replace(", ", " "))
every_toy = pytest.mark.parametrize("toy", TOYS, ids=lambda t: t.name.replace(", ", " "))


def attach(toy, name="default", model=None, seed=0, **options):
    """The toy with an adapter whose factors are random, as after training."""
    model = toy.model() if model is None else model
    values = {"rank": 2, "alpha": 3, "target_modules": list(toy.targets)} | options
    bank = veneer.attach(model, veneer.AdapterConfig(**values), name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        for parameter in bank.parameters(name).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, bank


def answer(model, toy, dtype=None):
    model.eval()
    batch = toy.batch()
    with torch.no_grad():
        return model(**{k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in batch.items()}).logits


def same_as_base(a, b, toy):
    """Bit for bit; torch's attention takes another of its code paths when its out_proj is not torch's own class."""
    return relative(a, b) < 1e-6 if "mha" in toy.targets else torch.equal(a, b)


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@every_toy
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(toy):
    model = toy.model()
    base = answer(model, toy)
    veneer.attach(model, veneer.AdapterConfig(rank=2, target_modules=list(toy.targets)))
    assert relative(answer(model, toy), base) < 1e-6
    model, _ = attach(toy)
    assert relative(answer(model, toy), base) > 1e-3


@every_toy
def test_save_and_load_twice_is_the_same_file(toy, tmp_path):
    model, _ = attach(toy)
    first = veneer.save_adapter(model, tmp_path / "first")
    again = toy.model()
    veneer.load_adapter(again, first)
    assert torch.equal(answer(again, toy), answer(model, toy))
    second = veneer.save_adapter(again, tmp_path / "second")
    names = "adapter_model.safetensors", "adapter_config.json"
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    third = toy.model()
    veneer.load_adapter(third, second)
    assert torch.equal(answer(third, toy), answer(model, toy))


@every_toy
def test_training_changes_the_adapter_and_nothing_else(toy):
    options = {"modules_to_save": [toy.keep]} if toy.keep else {}
    model, bank = attach(toy, **options, dropout=0.0 if "mha" in toy.targets else 0.1)
    bank.activate(None)
    base = weights(model)
    bank.activate("default")
    before = {key: value.detach().clone() for key, value in bank.parameters("default").items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(**toy.batch()).loss.backward()
        optimizer.step()
    for key, value in bank.parameters("default").items():
        assert not torch.equal(value, before[key]), key
    bank.activate(None)
    frozen = {key: value for key, value in base.items() if "lora_" not in key}
    now = {key: value for key, value in weights(model).items() if "lora_" not in key}
    assert same(frozen, now)


@every_toy
def test_disable_is_the_base_bit_for_bit_and_nests(toy):
    base = answer(toy.model(), toy)
    model, bank = attach(toy)
    adapted = answer(model, toy)
    with bank.disabled():
        assert same_as_base(answer(model, toy), base, toy)
        with bank.disabled():
            assert same_as_base(answer(model, toy), base, toy)
        assert same_as_base(answer(model, toy), base, toy)
    assert torch.equal(answer(model, toy), adapted)
    with pytest.raises(ZeroDivisionError), bank.disabled():
        raise ZeroDivisionError
    assert torch.equal(answer(model, toy), adapted) and bank.active == {"default": 1.0}
    bank.activate(None)
    with bank.disabled():
        pass
    assert bank.active == {} and same_as_base(answer(model, toy), base, toy)


@every_toy
def test_each_of_several_adapters_answers_as_if_alone(toy):
    model, bank = attach(toy, "one")
    attach(toy, "two", model, seed=1, rank=4, alpha=9)
    for name, seed, options in (("one", 0, {}), ("two", 1, {"rank": 4, "alpha": 9})):
        bank.activate(name)
        alone, _ = attach(toy, seed=seed, **options)
        assert torch.equal(answer(model, toy), answer(alone, toy))


@every_toy
def test_delete(toy):
    model, bank = attach(toy, "one")
    expected = answer(model, toy)
    attach(toy, "two", model, seed=1)
    bank.activate("one")
    with pytest.raises(AdapterStateError, match="three"):
        bank.remove("three")
    bank.remove("two")
    assert bank.names == ["one"] and not any("two" in key for key in model.state_dict())
    assert torch.equal(answer(model, toy), expected)
    with pytest.raises(AdapterStateError):
        bank.activate("two")
    bank.remove("one")
    assert bank.names == [] and same_as_base(answer(model, toy), answer(toy.model(), toy), toy)
    attach(toy, "one", model)  # the name is free again
    assert torch.equal(answer(model, toy), expected)


@mergeable_toy
def test_merging_is_exact_repeatable_and_undone_bit_for_bit(toy):
    model, bank = attach(toy)
    live = answer(model, toy)
    base = weights(toy.model())
    for _ in range(3):
        bank.merge()
        merged = answer(model, toy)
        assert relative(merged, live) < 1e-5
        bank.unmerge()
        assert torch.equal(answer(model, toy), live)
    veneer.detach(model)
    assert same(weights(model), base)


@mergeable_toy
def test_a_second_merge_does_not_add_the_adapter_twice(toy):
    model, bank = attach(toy)
    bank.merge()
    once = answer(model, toy)
    try:
        bank.merge()
    except AdapterStateError:
        pass  # saying that it is merged already is as good
    assert torch.equal(answer(model, toy), once)


@pytest.mark.parametrize("toy", [t for t in MERGEABLE if "mha" not in t.targets], ids=lambda t: t.name)
def test_merging_in_train_mode_with_dropout_is_deterministic(toy):
    first, bank = attach(toy, dropout=0.5)
    second, other = attach(toy, dropout=0.5)
    for model, merging in ((first, bank), (second, other)):
        model.train()
        merging.merge()
    assert torch.equal(answer(first, toy), answer(second, toy))
    plain, _ = attach(toy)
    assert relative(answer(first, toy), answer(plain, toy)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@mergeable_toy
def test_low_precision_bases(toy, dtype, tmp_path):
    """The answer keeps the base's dtype, the adapter stays float32, unmerging restores every bit."""
    model, bank = attach(toy, model=toy.model().to(dtype))
    live = answer(model, toy, dtype)
    assert live.dtype == dtype and live.isfinite().all()
    assert {p.dtype for p in bank.parameters("default").values()} == {torch.float32}
    exact, _ = attach(toy, model=toy.model().to(dtype).float())
    with torch.no_grad():
        rounded = answer(exact, toy)
    assert relative(live.float(), rounded) < (0.02 if dtype is torch.float16 else 0.1)
    base = weights(toy.model().to(dtype))
    bank.merge()
    assert relative(answer(model, toy, dtype).float(), rounded) < (0.02 if dtype is torch.float16 else 0.1)
    bank.unmerge()
    veneer.save_adapter(model, tmp_path / "adapter")
    veneer.detach(model)
    assert same(weights(model), base)
    full = toy.model().to(dtype).float()
    veneer.load_adapter(full, tmp_path / "adapter", force=True)
    assert torch.equal(answer(full, toy), rounded)


@every_toy
def test_loading_says_what_trains(toy, tmp_path):
    model, _ = attach(toy)
    path = veneer.save_adapter(model, tmp_path / "adapter")
    for trainable in (True, False):
        again = toy.model()
        bank = veneer.load_adapter(again, path, trainable=trainable)
        mine = {id(p) for p in bank.parameters("default").values()}
        for key, parameter in again.named_parameters():
            assert parameter.requires_grad == (trainable and id(parameter) in mine), key


@every_toy
def test_a_model_can_be_copied_with_its_adapters(toy):
    model, bank = attach(toy)
    expected, base = answer(model, toy), answer(toy.model(), toy)
    twin = copy.deepcopy(model)
    other = veneer.get_bank(twin)
    assert other is not bank and other.model is twin
    other.activate(None)
    assert same_as_base(answer(twin, toy), base, toy)
    assert torch.equal(answer(model, toy), expected)
    other.activate("default")
    with torch.no_grad():
        for parameter in other.parameters("default").values():
            parameter.zero_()
    assert torch.equal(answer(model, toy), expected)


@every_toy
def test_adapted_layers_show_the_weights_of_the_base(toy):
    model, bank = attach(toy)
    plain = toy.model()
    for name, layer in bank.layers.items():
        base = plain.get_submodule(name)
        if isinstance(base, nn.MultiheadAttention):
            assert torch.equal(layer.in_proj_weight, base.in_proj_weight)
            continue
        assert torch.equal(layer.weight, base.weight)
        for field in ("in_features", "out_features", "in_channels", "num_embeddings", "embedding_dim", "nx", "nf"):
            if hasattr(base, field):
                assert getattr(layer, field) == getattr(base, field)


# ---- two linears: what stacks, what trains, what is refused ----------------------------------------------------------

MLP = TOY["MLP"]


def plain_mlp():
    torch.manual_seed(3)
    return Toy(lin0=nn.Linear(10, 7), lin1=nn.Linear(7, 6)).eval()


def test_negative_weights_negate_and_cancel():
    """weight −1 gives base − ΔW; an adapter and its negative cancel."""
    model, bank = attach(MLP, "one")
    attach(MLP, "same", model)
    layer = bank.layers["lin0"]
    x = torch.randn(5, 10)
    base = layer.base_layer(x)
    bank.activate({"one": 1.0})
    forward = layer(x) - base
    bank.activate({"one": -1.0})
    assert relative(layer(x) - base, -forward) < 1e-5
    bank.activate({"one": 1.0, "same": -1.0})
    assert relative(layer(x), base) < 1e-6
    bank.activate({"one": 0.5, "same": -0.25})
    assert relative(layer(x) - base, 0.25 * forward) < 1e-5
    bank.activate({"one": 0.0})
    assert torch.equal(layer(x), base) or relative(layer(x), base) < 1e-7


@pytest.mark.parametrize("stack", [{"one": 1.0, "two": 1.0}, {"one": -1.0, "two": 0.5}, {"two": 2.0}], ids=str)
def test_a_stack_merges_to_the_weighted_sum(stack):
    model, bank = attach(MLP, "one")
    attach(MLP, "two", model, seed=1, rank=3, target_modules=["lin0", "lin1"])
    bank.activate(stack)
    live = answer(model, MLP)
    expected = sum(w * bank.layers["lin0"].delta(name) for name, w in stack.items())
    weight = plain_weight = MLP.model().lin0.weight
    bank.merge()
    assert relative(answer(model, MLP), live) < 1e-5
    merged = bank.layers["lin0"].weight if isinstance(model.lin0, type(bank.layers["lin0"])) else model.lin0.weight
    assert relative(merged - plain_weight, expected) < 1e-5
    bank.unmerge()
    assert torch.equal(bank.layers["lin0"].weight, weight)


def test_adapters_with_different_targets():
    model, bank = attach(MLP, "one", target_modules=["lin0"])
    attach(MLP, "two", model, seed=1, target_modules=["lin1"])
    bank.activate("one")
    alone, _ = attach(MLP, target_modules=["lin0"])
    assert torch.equal(answer(model, MLP), answer(alone, MLP))
    bank.activate({"one": 1.0, "two": 1.0})
    both = answer(model, MLP)
    bank.activate("two")
    assert not torch.equal(answer(model, MLP), both)
    assert set(bank.layers) == {"lin0", "lin1"}
    bank.remove("two")
    bank.activate("one")
    assert torch.equal(answer(model, MLP), answer(alone, MLP))


def test_only_adapters_and_kept_modules_require_gradients():
    model, bank = attach(MLP, modules_to_save=["lin1"])
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    mine = {id(p) for p in bank.parameters("default").values()}
    assert trained == {key for key, p in model.named_parameters() if id(p) in mine}
    with bank.disabled():
        assert not any(p.requires_grad for key, p in model.named_parameters() if "lora_" not in key)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == trained


def test_switching_adapters_keeps_what_the_user_froze():
    model, bank = attach(MLP, "one")
    attach(MLP, "two", model)
    frozen = bank.parameters("one")["lin0.lora_A"].requires_grad_(False)
    bank.activate("two")
    bank.activate("one")
    with bank.disabled():
        pass
    assert not frozen.requires_grad and bank.parameters("one")["lin0.lora_B"].requires_grad


def test_inactive_adapters_get_no_gradient():
    model, bank = attach(MLP, "one")
    attach(MLP, "two", model)
    bank.activate("one")
    model(**MLP.batch()).loss.backward()
    assert all(p.grad is not None for p in bank.parameters("one").values())
    assert all(p.grad is None for p in bank.parameters("two").values())


def test_two_adapters_keep_their_own_copy_of_a_module():
    model, bank = attach(MLP, "one", modules_to_save=["lin1"])
    first = answer(model, MLP)
    attach(MLP, "two", model, seed=1, modules_to_save=["lin1"])
    second = answer(model, MLP)
    attach(MLP, "three", model, seed=2)
    assert not torch.equal(first, second)
    for name, expected in (("one", first), ("two", second)):
        bank.activate(name)
        assert torch.equal(answer(model, MLP), expected)
    bank.activate("three")
    assert torch.equal(model.lin1.weight, MLP.model().lin1.weight)
    with pytest.raises(AdapterStateError, match="stacked"):
        bank.activate({"one": 1.0, "three": 1.0})
    bank.remove("one")
    bank.activate("two")
    assert torch.equal(answer(model, MLP), second)
    bank.activate(None)
    assert torch.equal(answer(model, MLP), answer(MLP.model(), MLP))


def test_a_module_is_kept_or_adapted_not_both():
    with pytest.raises(TargetError, match="lin0"):
        attach(MLP, target_modules=["lin0", "lin1"], modules_to_save=["lin0"])


def test_a_taken_name_is_refused_and_nothing_changes():
    model, bank = attach(MLP, "one")
    before = weights(model)
    with pytest.raises(AdapterStateError, match="one"):
        attach(MLP, "one", model, seed=4)
    assert same(weights(model), before) and bank.names == ["one"]


@pytest.mark.parametrize("names", [("foo", "foobar"), ("lora_A", "lora"), ("default", "default_0"), ("lin0", "weight")])
def test_names_that_contain_each_other_stay_apart(names, tmp_path):
    """Adapter names are looked up whole: removing or saving "foo" leaves "foobar" alone."""
    model, bank = attach(MLP, names[0])
    attach(MLP, names[1], model, seed=1)
    expected = answer(model, MLP)
    first = load_file(veneer.save_adapter(model, tmp_path / "a", name=names[0]) / "adapter_model.safetensors")
    second = load_file(veneer.save_adapter(model, tmp_path / "b", name=names[1]) / "adapter_model.safetensors")
    assert first.keys() == second.keys() and not any(torch.equal(first[key], second[key]) for key in first)
    bank.remove(names[0])
    bank.activate(names[1])
    assert torch.equal(answer(model, MLP), expected)


@pytest.mark.parametrize("name", ["default", "other", "lora_A", "0"])
def test_the_name_makes_no_difference(name, tmp_path):
    model, bank = attach(MLP, name)
    reference, _ = attach(MLP)
    assert torch.equal(answer(model, MLP), answer(reference, MLP))
    mine, theirs = veneer.save_adapter(model, tmp_path / "a"), veneer.save_adapter(reference, tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (mine / file).read_bytes() == (theirs / file).read_bytes()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"lin0": 3 / 2, "lin1": 3 / 2}),
        ({"rslora": True}, {"lin0": 3 / 2**0.5, "lin1": 3 / 2**0.5}),
        ({"rank_pattern": {"lin0": 4}}, {"lin0": 3 / 4, "lin1": 3 / 2}),
        ({"alpha_pattern": {"lin1": 7}}, {"lin0": 3 / 2, "lin1": 7 / 2}),
        ({"rank_pattern": {"lin1": 5}, "alpha_pattern": {"lin1": 7}, "rslora": True}, {"lin1": 7 / 5**0.5}),
        ({"rank_pattern": {"^lin0$": 4}, "alpha_pattern": {"lin[01]": 8}}, {"lin0": 8 / 4, "lin1": 8 / 2}),
    ],
    ids=str,
)
def test_scaling(options, expected, tmp_path):
    model, bank = attach(MLP, target_modules=["lin0", "lin1"], **options)
    again = MLP.model()
    loaded = veneer.load_adapter(again, veneer.save_adapter(model, tmp_path / "adapter"))
    for name, scaling in expected.items():
        assert bank.layers[name].scaling["default"] == pytest.approx(scaling, rel=1e-12)
        assert loaded.layers[name].scaling["default"] == pytest.approx(scaling, rel=1e-12)


def test_dropout_acts_on_the_adapter_in_training_only():
    model, bank = attach(MLP, dropout=0.9)
    still, _ = attach(MLP)
    assert torch.equal(answer(model, MLP), answer(still, MLP))
    model.train()
    torch.manual_seed(0)
    one, two = (model(**MLP.batch()).logits for _ in range(2))
    assert not torch.equal(one, two)
    with bank.disabled():
        assert torch.equal(model(**MLP.batch()).logits, MLP.model()(**MLP.batch()).logits)


def test_rows_of_one_batch_take_their_own_adapter():
    model, bank = attach(MLP, "one")
    attach(MLP, "two", model, seed=1, target_modules=["lin1"], rank=3)
    parts = []
    for name in ("one", None, "two"):
        bank.activate(name)
        parts.append(answer(model, MLP))
    with bank.route(["one", None, "two"]):
        rows = answer(model, MLP)
    for row, part in enumerate(parts):
        assert relative(rows[row], part[row]) < 1e-6
    with bank.route([None, None, None]):
        assert torch.equal(answer(model, MLP), parts[1])
    with pytest.raises(AdapterStateError, match="3 rows|2 rows|rows"), bank.route(["one", "two"]):
        answer(model, MLP)
    with pytest.raises(AdapterStateError, match="nobody"), bank.route(["nobody", None, None]):
        pass


def test_a_layer_may_stand_in_a_gru_model_that_is_kept_whole(tmp_path):
    """A recurrent layer is no target, but it may be trained whole beside the adapter."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin0, self.gru = nn.Linear(10, 7), nn.GRU(7, 5, batch_first=True)

        def forward(self, x):
            return self.gru(self.lin0(x))[0]

    torch.manual_seed(0)
    base = Recurrent()
    x = torch.randn(2, 4, 10)
    model = copy.deepcopy(base)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2, target_modules=["lin0"], modules_to_save=["gru"]), seed=0)
    with torch.no_grad():
        for parameter in bank.parameters("default").values():
            parameter.add_(0.1)
    again = copy.deepcopy(base)
    veneer.load_adapter(again, veneer.save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(again(x), model(x)) and not torch.equal(model(x), base(x))
    with pytest.raises(TargetError, match="gru"):
        veneer.attach(copy.deepcopy(base), veneer.AdapterConfig(rank=2, target_modules=["gru"]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged(value):
    """As PEFT's safe_merge: a factor that is not finite must not reach the base's weights."""
    model, bank = attach(MLP)
    base = weights(MLP.model())
    with torch.no_grad():
        bank.parameters("default")["lin0.lora_B"][0, 0] = value
    with pytest.raises(veneer.VeneerError, match="lin0"):
        bank.merge()
    veneer.detach(model)
    assert same(weights(model), base)


def test_removing_a_merged_adapter_cannot_leave_its_weights_behind():
    model, bank = attach(MLP)
    bank.merge()
    try:
        bank.remove("default")
    except AdapterStateError:
        bank.unmerge()
        bank.remove("default")
    assert torch.equal(answer(model, MLP), answer(MLP.model(), MLP))


def test_a_merge_that_cannot_be_is_refused_and_nothing_changes():
    toy = TOY["Conv2d in groups"]
    model, bank = attach(toy)
    live = answer(model, toy)
    with pytest.raises(AdapterStateError, match="grouped"):
        bank.merge()
    assert torch.equal(answer(model, toy), live)


def test_dropout_before_torchs_attention_is_refused():
    """PEFT raises too: torch computes the projections itself, so there is no input to drop from."""
    with pytest.raises(TargetError, match="dropout: 0"):
        attach(TOY["MultiheadAttention"], dropout=0.1)

"""Adapters combined as files: against the live stack, and against PEFT's add_weighted_adapter."""

import json

import peft
import pytest
import torch
from conformance.toys import TOY
from formats.adapters import EXPERTS, moe, put, saved
from torch import nn

import veneer
from conftest import tiny_llama
from veneer.adapter.algebra import METHODS, sparse
from veneer.errors import AdapterFormatError, AdapterStateError, ConfigError, WrongBaseError
from veneer.formats.adapter_file import read_adapter
from veneer.formats.combine import combine, layer_weights, parse_weights

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55]])
WEIGHTS = [0.7, -0.4]
ODD = {"rank": 3, "alpha": 7, "rslora": True, "target_modules": ["v_proj", "up_proj"], "rank_pattern": {"v_proj": 2}}
"""Alpha is no rank, √r scaling, another rank by pattern, and half its targets are not the other adapter's."""


@pytest.fixture
def two(tmp_path):
    """Two adapters that share v_proj only, and differ in rank and scaling."""
    return [saved(tmp_path / "one", tiny_llama(), 1), saved(tmp_path / "two", tiny_llama(), 2, **ODD)]


def deltas(path):
    """ΔW of each layer, from what adapter_config.json says."""
    found = {name: (f.scaling, *f.pairs()[0]) for name, f in read_adapter(path).layers.items()}
    return {name: s * (b.double() @ a.double()) for name, (s, a, b) in found.items()}


def relative(found, wanted):
    """Relative error of several layers together; a layer that one side lacks counts as 0."""
    keys = found.keys() | wanted.keys()
    zero = torch.zeros(())
    off = sum(float((found.get(k, zero) - wanted.get(k, zero)).square().sum()) for k in keys)
    return (off / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5


def weighted_sum(paths, weights=WEIGHTS):
    total = {}
    for path, w in zip(paths, weights):
        for name, delta in deltas(path).items():
            total[name] = total.get(name, 0) + w * delta
    return total


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_progress_counts_layers_and_devices_are_checked(two):
    seen = []
    report = combine(two, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, len(report.layers)) for i in range(len(report.layers))]
    with pytest.raises(ConfigError, match="device 'abacus'"):
        combine(two, device="abacus")


def test_small_ranks_in_a_common_basis_are_not_wiped_out(tmp_path):
    """Of two updates of rank 1 the common basis has 4 values, of which the default density would keep none."""
    paths = [saved(tmp_path / str(seed), tiny_llama(), seed, rank=1, alpha=1) for seed in (1, 2)]
    report = combine(paths, tmp_path / "out", method="core")
    assert all(float(d.abs().max()) > 0 for d in deltas(tmp_path / "out").values())
    assert report.error < 0.95


def test_parts_that_cancel_out_are_no_error(two, tmp_path):
    report = combine([two[0], two[0]], tmp_path / "nothing", weights=[1, -1])
    assert report.error == 0 and report.worst.size == 0
    found = deltas(tmp_path / "nothing")
    assert max(float(d.abs().max()) for d in found.values()) < 1e-12 * max(
        float(d.abs().max()) for d in deltas(two[0]).values()
    )
    report = combine(two, weights=[1, 1e-6], method="svd", rank=1)
    assert report.error > 0


def test_cat_is_the_live_stack_in_veneer_and_in_peft(two, tmp_path):
    report = combine(two, tmp_path / "out", weights=WEIGHTS)
    stacked = put(put(tiny_llama(), "a", 1), "b", 2, **ODD)
    veneer.get_bank(stacked).activate({"a": 0.7, "b": -0.4})
    wanted = logits(stacked)
    model = tiny_llama()
    veneer.load_adapter(model, tmp_path / "out")
    assert torch.allclose(logits(model), wanted, atol=1e-5)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")), wanted, atol=1e-5)
    assert (wanted - logits(tiny_llama())).abs().max() > 0.05
    assert report.error < 1e-6 and relative(deltas(tmp_path / "out"), weighted_sum(two)) < 1e-6
    assert report.ranks == "3 to 6" and len(report.layers) == 6


@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear"])
def test_the_error_said_is_the_error_of_what_was_written(method, two, tmp_path):
    before = {file: file.read_bytes() for path in two for file in path.iterdir()}
    report = combine(two, tmp_path / "out", weights=WEIGHTS, method=method)
    found, wanted = deltas(tmp_path / "out"), weighted_sum(two)
    assert report.error == pytest.approx(relative(found, wanted), rel=1e-6, abs=1e-7)
    errors = {name: relative({name: found[name]}, {name: wanted[name]}) for name in wanted}
    assert report.worst.error == pytest.approx(max(errors.values()), rel=1e-6, abs=1e-7)
    assert report.bytes == 4 * report.parameters == 4 * sum(
        f.lora_A.numel() + f.lora_B.numel() for f in read_adapter(tmp_path / "out").layers.values()
    )  # fmt: skip
    assert {file: file.read_bytes() for path in two for file in path.iterdir()} == before
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["use_rslora"] is False
    for name, f in read_adapter(tmp_path / "out").layers.items():  # alpha = r in every layer
        assert f.scaling == 1.0, name
    veneer.load_adapter(tiny_llama(), tmp_path / "out")


def test_a_result_is_repeatable_and_its_seed_matters(two, tmp_path):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        combine(two, tmp_path / out, method="dare-ties", seed=seed)
    a, b, c = ((tmp_path / out / "adapter_model.safetensors").read_bytes() for out in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("toy", "method"),
    [(t, m) for t in ("Conv2d", "Embedding", "MultiheadAttention and linear") for m in ("cat", "knots")],
)
def test_other_kinds_of_layers(toy, method, tmp_path):
    options = {"target_modules": list(TOY[toy].targets)}
    ones = [saved(tmp_path / "a", TOY[toy].model(), 1, **options)]
    ones += [saved(tmp_path / "b", TOY[toy].model(), 2, rank=2, alpha=5, **options)]
    everything = {"density": 1.0, "like": "mergekit"} if method == "knots" else {}
    report = combine(ones[:1] if method == "knots" else ones, tmp_path / "out", method=method, **everything)
    stacked = put(put(TOY[toy].model(), "a", 1, **options), "b", 2, rank=2, alpha=5, **options)
    veneer.get_bank(stacked).activate({"a": 1.0} if method == "knots" else {"a": 1.0, "b": 1.0})
    model, batch = TOY[toy].model(), TOY[toy].batch()
    plain = model(**batch).logits
    veneer.load_adapter(model, tmp_path / "out")
    wanted = stacked(**batch).logits
    assert torch.allclose(model(**batch).logits, wanted, atol=1e-5) and not torch.allclose(plain, wanted, atol=1e-3)
    assert report.error < 1e-6


@pytest.mark.parametrize("method", ["cat", "svd", "iso-c", "ties"])
def test_fused_experts(method, tmp_path):
    ones = [saved(tmp_path / "a", moe(), 1, **EXPERTS), saved(tmp_path / "b", moe(), 2, **EXPERTS | {"rank": 2})]
    report = combine(ones, tmp_path / "out", method=method, weights=WEIGHTS)
    model = moe()
    veneer.load_adapter(model, tmp_path / "out")
    if method == "cat":
        stacked = put(put(moe(), "a", 1, **EXPERTS), "b", 2, **EXPERTS | {"rank": 2})
        veneer.get_bank(stacked).activate(dict(zip("ab", WEIGHTS)))
        ids = IDS % 60
        assert torch.allclose(model(input_ids=ids).logits, stacked(input_ids=ids).logits, atol=1e-5)
    assert len(report.layers) == 4 and (report.error < 1e-6) == (method == "cat")


# Against PEFT.


def peft_pair(first: dict, second: dict):
    """A PEFT model with two random adapters "a" and "b"."""
    common = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**common | first), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(**common | second))
    return model


def peft_deltas(model, name):
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {n: m.get_delta_weight(name).detach().double() for n, m in layers.items() if name in m.lora_A}


def both(model, tmp_path, combination_type, method, *, weights=WEIGHTS, density=None, **options):
    """(Veneer's ΔW, PEFT's) of one combination."""
    model.save_pretrained(tmp_path)
    dense = {} if density is None else {"density": density}
    model.add_weighted_adapter(["a", "b"], weights, "new", combination_type=combination_type, **dense)
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=weights, method=method, **dense, **options)
    return deltas(tmp_path / "out"), peft_deltas(model, "new")


@pytest.mark.parametrize(
    ("combination_type", "method", "density"),
    [
        ("cat", "cat", None),
        ("svd", "svd", None),
        ("linear", "linear", None),
        ("ties", "ties", 0.4),
        ("dare_linear", "dare-linear", 0.4),
        ("dare_ties", "dare-ties", 0.4),
        ("magnitude_prune", "magnitude-prune", 0.4),
        ("ties_svd", "ties", 0.4),
        ("dare_linear_svd", "dare-linear", 0.4),
        ("dare_ties_svd", "dare-ties", 0.4),
        ("magnitude_prune_svd", "magnitude-prune", 0.4),
    ],
)
def test_like_peft_where_peft_is_right(combination_type, method, density, tmp_path, monkeypatch):
    """α = r and no rsLoRA, where PEFT scales as it should."""

    def same_mask(probability, generator=None):  # one draw for each shape, for both libraries
        uniform = torch.rand(probability.shape, generator=torch.Generator().manual_seed(probability.numel()))
        return (uniform < probability).to(probability.dtype)

    monkeypatch.setattr(torch, "bernoulli", same_mask)
    monkeypatch.setattr(sparse, "random_mask", same_mask)
    own = {} if density is None else {"like": "peft"}
    own |= {"space": "full", "rank": 4} if density and combination_type.endswith("svd") else {}
    found, wanted = both(peft_pair({}, {}), tmp_path, combination_type, method, density=density, **own)
    assert found.keys() == wanted.keys() and relative(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"lora_alpha": 9}, {"lora_alpha": 2}),
        ({"use_rslora": True, "lora_alpha": 3}, {}),
        ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 11}}, {"r": 3, "lora_alpha": 5}),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "up_proj"], "lora_alpha": 8}),
    ],
    ids=["alpha", "rslora", "patterns", "disjoint"],
)
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_right_for_every_scaling(method, first, second, tmp_path):
    model = peft_pair(first, second)
    model.save_pretrained(tmp_path)
    one, other = peft_deltas(model, "a"), peft_deltas(model, "b")
    wanted = {n: 0.7 * one.get(n, 0.0) - 0.4 * other.get(n, 0.0) for n in one.keys() | other.keys()}
    rank = {"rank": 8} if method == "svd" else {}
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=WEIGHTS, method=method, **rank)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out", adapter_name="new")
    assert relative(peft_deltas(loaded, "new"), wanted) < 1e-5


def test_peft_inflates_what_it_combines_under_rslora_and_veneer_does_not(tmp_path):
    """PEFT's merged configuration inherits use_rslora from the first adapter: √r too large."""
    model = peft_pair({"use_rslora": True}, {})
    wanted = {n: 0.7 * d - 0.4 * peft_deltas(model, "b")[n] for n, d in peft_deltas(model, "a").items()}
    found, theirs = both(model, tmp_path, "cat", "cat")
    assert relative(found, wanted) < 1e-6
    inflated = {n: theirs[n] / 8**0.5 for n in theirs}
    assert relative(theirs, wanted) > 1 and relative(inflated, wanted) < 1e-5


def test_linear_ties_and_a_zeroed_adapter_at_alpha_that_is_no_rank(tmp_path):
    """What PEFT's svd types get wrong where they apply s twice, and a zeroed second adapter shows."""
    model = peft_pair({"lora_alpha": 12}, {})
    for name, parameter in model.named_parameters():
        if ".b." in name:
            parameter.data.zero_()
    model.save_pretrained(tmp_path)
    wanted = peft_deltas(model, "a")
    for method, options in [
        ("linear", {}),
        ("svd", {}),
        ("ties", {"density": 1.0, "like": "peft"}),
        ("ties", {"density": 1.0, "like": "peft", "space": "full"}),
        ("magnitude-prune", {"density": 1.0}),
        ("core", {"density": 1.0}),
        ("tsv", {}),
    ]:
        out = tmp_path / f"{method}{len(options)}"
        combine([tmp_path / "a", tmp_path / "b"], out, method=method, **options)
        assert relative(deltas(out), wanted) < 1e-6, method


# Weights, checks, provenance.


def test_weights_by_layer(two, tmp_path):
    file = tmp_path / "w.yaml"
    file.write_text("layers.0.*v_proj: [2, 0.5]\n.*: [0.25, -1]\n")
    combine(two, tmp_path / "out", weights=parse_weights(str(file)))
    found, (one, other) = deltas(tmp_path / "out"), map(deltas, two)
    name = "model.layers.{}.self_attn.v_proj"
    first, second = name.format(0), name.format(1)
    assert torch.allclose(found[first], 2 * one[first] + 0.5 * other[first], atol=1e-6)
    assert torch.allclose(found[second], 0.25 * one[second] - other[second], atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1.0], "one number for each of the 2"),
        ([1.0, float("nan")], "finite"),
        ({"q_proj": [1, 2]}, "no weights for m.v_proj"),
        ({"k_proj": [1, 2], ".*": [1, 1]}, "'k_proj' matches no layer"),
        ({".*": "ab"}, "one number for each"),
    ],
)
def test_weights_that_do_not_fit(weights, says):
    with pytest.raises(ConfigError, match=says):
        layer_weights(weights, ["m.q_proj", "m.v_proj"], 2)


def test_adapters_of_different_bases_are_refused(two, tmp_path):
    other = saved(tmp_path / "other", tiny_llama(seed=1))
    with pytest.raises(WrongBaseError, match="different bases"):
        combine([two[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    combine([two[0], other], tmp_path / "out", force=True)
    wide = saved(tmp_path / "wide", tiny_llama(hidden_size=48))
    with pytest.raises(AdapterFormatError, match="different bases"):
        combine([two[0], wide], tmp_path / "again", force=True)


def test_what_cannot_be_combined_is_refused_or_carried_along(two, tmp_path):
    dora = saved(tmp_path / "dora", tiny_llama(), dora=True)
    with pytest.raises(AdapterFormatError, match="DoRA's magnitudes"):
        combine([two[0], dora])
    kept = [saved(tmp_path / f"kept{i}", tiny_llama(), i, modules_to_save=["model.norm"]) for i in (1, 2)]
    with pytest.raises(AdapterFormatError, match="first .*model.norm.weight"):
        combine(kept)
    with pytest.raises(AdapterFormatError, match="model.norm"):
        combine([two[0], kept[0]])
    combine(kept[:1], tmp_path / "out", weights=[0.5])
    model, alone = tiny_llama(), tiny_llama()
    veneer.load_adapter(model, tmp_path / "out")
    veneer.load_adapter(alone, kept[0])
    assert torch.equal(model.model.norm.weight, alone.model.norm.weight)
    with pytest.raises(AdapterStateError, match="not empty"):
        combine(two, tmp_path / "out")
    with pytest.raises(ConfigError, match="no adapter"):
        combine([])


def test_provenance_says_what_went_in(two, tmp_path):
    import hashlib

    report = combine(two, tmp_path / "out", weights=WEIGHTS, method="ties", density=0.3)
    record = json.loads((tmp_path / "out" / "veneer.json").read_text())
    first = json.loads((two[0] / "veneer.json").read_text())
    assert record["base"] == first["base"]
    assert record["combined"]["method"] == "ties" and record["combined"]["weights"] == WEIGHTS
    assert record["combined"]["density"] == 0.3 and record["combined"]["relative_error"] == report.error
    for source, path in zip(record["combined"]["sources"], two):
        content = (path / "adapter_model.safetensors").read_bytes()
        assert source["sha256"]["adapter_model.safetensors"] == hashlib.sha256(content).hexdigest()
    with pytest.raises(WrongBaseError):
        veneer.load_adapter(tiny_llama(seed=1), tmp_path / "out")


def test_no_matrix_of_the_weights_size_is_made(tmp_path, monkeypatch):
    """4,096 × 4,096 layers: the dense ΔW would be 128 MiB in float64."""
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    ones = [saved(tmp_path / str(i), model if i == 0 else nn.Sequential(model[0].base_layer), i, target_modules=["0"])
            for i in range(2)]  # fmt: skip
    biggest, matmul = [0], torch.Tensor.__matmul__

    def watched(self, other):
        out = matmul(self, other)
        biggest[0] = max(biggest[0], out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    for method in ("cat", "svd", "linear", "knots", "core", "tsv", "iso-c"):
        combine(ones, method=method)
    assert 0 < biggest[0] <= 4096 * 2 * 8

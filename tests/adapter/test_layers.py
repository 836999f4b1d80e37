"""Each kind of adapted layer against its formula in float64: outputs, gradients, merge, several adapters, rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.adapter.layers import AdaptedModule
from veneer.errors import AdapterStateError, ConfigError, TargetError


class One(nn.Module):
    """A model that is one module, under the name `m`."""

    def __init__(self, module):
        super().__init__()
        self.m = module

    def forward(self, *args):
        out = self.m(*args)
        return out[0] if isinstance(out, tuple) else out


def randomise(bank, name="default"):
    torch.manual_seed(5)
    for key, p in bank.parameters(name).items():
        p.data = torch.rand_like(p) + 0.5 if "magnitude" in key else torch.randn_like(p)


KINDS = {
    "linear": (lambda: nn.Linear(7, 9), lambda: torch.randn(4, 3, 7)),
    "linear without bias": (lambda: nn.Linear(7, 9, bias=False), lambda: torch.randn(4, 7)),
    "Conv1D": (lambda: Conv1D(9, 7), lambda: torch.randn(4, 3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(4, 4, 11)),
    "conv2d": (
        lambda: nn.Conv2d(5, 6, (3, 1), padding="same", padding_mode="reflect"),
        lambda: torch.randn(4, 5, 7, 5),
    ),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False), lambda: torch.randn(4, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: torch.randn(4, 4, 3, 4, 5)),
    "embedding": (lambda: nn.Embedding(11, 9, padding_idx=0), lambda: torch.randint(1, 11, (4, 5))),
    "attention": (lambda: nn.MultiheadAttention(12, 3, batch_first=True), None),
}


def make(kind, **options):
    torch.manual_seed(0)
    build, data = KINDS[kind]
    model = One(build())
    x = (torch.randn(4, 5, 12),) * 3 if data is None else (data(),)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, alpha=6, target_modules=["m"], **options))
    randomise(bank)
    return model, bank, x


def dense_delta(layer, name="default"):
    """s·B·A in float64 with the definition's own loops, in the shape of the frozen weight."""
    a, b, s = layer.lora_A[name].double(), layer.lora_B[name].double(), layer.scaling[name]
    flat = s * b.flatten(1) @ a.flatten(1)
    return flat.t() if layer.kind == "embedding" else flat


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}, {"lora_bias": True}], ids=str)
def test_live_delta_and_merged_agree_with_the_definition(kind, variant):
    supported = {"attention": [], "embedding": ["dora"]}.get(kind, ["dora", "lora_bias"])
    option = next(iter(variant), None)
    if option in ("dora", "lora_bias") and option not in supported:
        with pytest.raises(TargetError, match=f"{option} is not defined"):
            make(kind, **variant)
        return
    model, bank, x = make(kind, **variant)
    layer = bank.layers["m"]
    assert layer.scaling["default"] == pytest.approx(6 / (2 if variant.get("rslora") else 4))
    base = layer.base_layer
    frozen = (base.in_proj_weight if kind == "attention" else base.weight).double()
    frozen = frozen.t() if kind == "Conv1D" else frozen
    wanted = frozen + dense_delta(layer).reshape(frozen.shape)
    if variant.get("dora"):
        dims = (0,) if kind == "embedding" else tuple(range(1, frozen.ndim))
        m = layer.lora_magnitude_vector["default"].double()
        shape = (1, -1) if kind == "embedding" else (-1, *(1,) * (frozen.ndim - 1))
        wanted = m.view(shape) * wanted / torch.linalg.vector_norm(wanted, dim=dims, keepdim=True)
    torch.testing.assert_close(frozen + layer.delta("default").double(), wanted, rtol=1e-5, atol=1e-5)
    live = model(*x)
    bank.merge()
    torch.testing.assert_close(model(*x), live, rtol=1e-4, atol=1e-4)
    assert isinstance(layer.base_layer, type(base)) and layer.base_layer is not base
    bank.unmerge()
    assert layer.base_layer is base and torch.equal(model(*x), live)
    merged = veneer.merge(model)
    assert not any(isinstance(m, AdaptedModule) for m in merged.modules())
    torch.testing.assert_close(merged(*x), live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_the_dense_weight(kind, dora):
    """∂L/∂A and ∂L/∂B through ΔW, by the chain rule on the definition in float64; DoRA's norm is a constant."""
    if dora and kind == "attention":
        pytest.skip("DoRA is not defined for it")
    model, bank, x = make(kind, dora=dora)
    model, x = model.double(), tuple(t.double() if t.is_floating_point() else t for t in x)
    torch.manual_seed(1)
    y = model(*x)
    g = torch.randn_like(y)
    (y * g).sum().backward()
    grads = {key: p.grad for key, p in bank.parameters("default").items()}
    layer = bank.layers["m"]
    base, layers = layer.base_layer, {"": layer}
    if kind == "attention":
        layers["out_proj."] = bank.layers["m.out_proj"]
    weights = {}
    for prefix, part in layers.items():
        key = "in_proj_weight" if part.kind == "attention" else f"{prefix}base_layer.weight" if prefix else "weight"
        frozen = base.get_parameter(key).detach()
        a, b = part.lora_A["default"], part.lora_B["default"]
        a, b = (t.detach().clone().requires_grad_(True) for t in (a, b))
        delta = part.scaling["default"] * b.flatten(1) @ a.flatten(1)
        delta = delta.t() if kind in ("embedding", "Conv1D") else delta
        total = frozen + delta.reshape(frozen.shape)
        leaves = [a, b]
        if dora:
            dims = (0,) if kind in ("embedding", "Conv1D") else tuple(range(1, frozen.ndim))
            m = part.lora_magnitude_vector["default"].detach().clone().requires_grad_(True)
            shape = (1, -1) if kind in ("embedding", "Conv1D") else (-1, *(1,) * (frozen.ndim - 1))
            total = m.view(shape) * total / torch.linalg.vector_norm(total.detach(), dim=dims, keepdim=True)
            leaves.append(m)
        weights[key] = (total, leaves)
    out = torch.func.functional_call(base, {k: t for k, (t, _) in weights.items()}, x)
    out = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(y, out, rtol=1e-5, atol=1e-5)
    (out * g).sum().backward()
    wanted = [leaf.grad for _, leaves in weights.values() for leaf in leaves]
    assert len(wanted) == len(grads)
    for (key, mine), theirs in zip(grads.items(), wanted):
        torch.testing.assert_close(mine, theirs.reshape(mine.shape), rtol=1e-4, atol=1e-5, msg=key)
    assert all(p.grad is None for n, p in base.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "attention"])
def test_several_adapters_stack_and_rows_choose(kind):
    model, bank, x = make(kind, dora=True)
    second = veneer.AdapterConfig(rank=2, alpha=5, target_modules=["m"])
    veneer.attach(model, second, name="two")
    randomise(bank, "two")
    alone = {}
    for name in (None, "default", "two"):
        bank.activate(name)
        alone[name] = model(*x)
    bank.activate({"default": -0.5, "two": 2.0})
    wanted = alone[None] - 0.5 * (alone["default"] - alone[None]) + 2 * (alone["two"] - alone[None])
    torch.testing.assert_close(model(*x), wanted, rtol=1e-4, atol=1e-4)
    with bank.route(["two", None, "default", "two"]):
        rows = model(*x)
    for i, name in enumerate(["two", None, "default", "two"]):
        torch.testing.assert_close(rows[i], alone[name][i], rtol=1e-4, atol=1e-4)
    assert torch.equal(rows[1], alone[None][1])
    bank.remove("default")
    bank.activate("two")
    torch.testing.assert_close(model(*x), alone["two"])
    veneer.detach(model)
    assert torch.equal(model(*x), alone[None])


def test_a_fresh_dora_adapter_changes_nothing_and_its_magnitudes_are_the_norms():
    torch.manual_seed(0)
    model, x = One(nn.Linear(7, 9)), torch.randn(3, 7)
    before = model(x)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=3, dora=True))
    torch.testing.assert_close(model(x), before)
    m = bank.parameters("default")["m.lora_magnitude_vector"]
    torch.testing.assert_close(m.data, model.m.weight.norm(dim=1))


@pytest.mark.parametrize("change", ["trained", "replaced"])
def test_doras_norms_follow_a_weight_that_changes(change):
    torch.manual_seed(0)
    weight = torch.rand(5, 7)
    model, x = nn.Sequential(nn.Linear(7, 5)), torch.randn(3, 7)
    model.load_state_dict({"0.weight": weight + 1}, strict=False, assign=True)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2, dora=True, target_modules=["0"]))
    bank.parameters("default")["0.lora_B"].data.normal_()
    model(x)
    if change == "trained":
        with torch.no_grad():
            model[0].weight.mul_(torch.rand(5, 1) + 1)
    else:
        model.load_state_dict({"0.base_layer.weight": weight}, strict=False, assign=True)
    torch.testing.assert_close(bank.layers["0"].merged({"default": 1.0})(x), model(x))


def test_dora_over_a_zero_row_stays_finite():
    model = One(nn.Linear(6, 5))
    model.m.weight.data[2] = 0
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2, dora=True))
    y = model(torch.randn(3, 6))
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in bank.parameters("default").values())


@settings(max_examples=30, deadline=None)
@given(
    d_in=st.integers(1, 13), d_out=st.integers(1, 13), rank=st.integers(1, 8), scale=st.floats(-3, 3), seed=st.integers(0, 99)
)  # fmt: skip
def test_dora_norm_is_the_norm_of_the_dense_sum(d_in, d_out, rank, scale, seed):
    from veneer.adapter.frozen import row_square_norms
    from veneer.adapter.math import dora_norm

    g = torch.Generator().manual_seed(seed)
    w, a, b = (torch.randn(*s, generator=g) for s in ((d_out, d_in), (rank, d_in), (d_out, rank)))
    wanted = (w.double() + scale * b.double() @ a.double()).norm(dim=1)
    size = w.double().norm(dim=1) + abs(scale) * (b.double() @ a.double()).norm(dim=1)  # where the sum may cancel
    found = dora_norm(w, row_square_norms(w), a, b, scale).double()
    assert ((found - wanted).abs() <= 1e-3 * size).all()


def test_grouped_convolutions_act_but_refuse_to_merge():
    torch.manual_seed(0)
    model, x = One(nn.Conv2d(4, 6, 3, groups=2)), torch.randn(2, 4, 5, 6)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, alpha=6, target_modules=["m"]))
    randomise(bank)
    a, b = bank.layers["m"].lora_A["default"], bank.layers["m"].lora_B["default"]
    wanted = bank.layers["m"].base_layer(x) + 1.5 * nn.functional.conv2d(nn.functional.conv2d(x, a), b, groups=2)
    torch.testing.assert_close(model(x), wanted)
    with pytest.raises(AdapterStateError, match="mixes the groups"):
        bank.merge()
    torch.testing.assert_close(model(x), wanted)  # a refused merge changes nothing
    with pytest.raises(TargetError, match="no multiple of its 2 groups"):
        veneer.attach(One(nn.Conv2d(4, 6, 3, groups=2)), veneer.AdapterConfig(rank=3, target_modules=["m"]))


def test_torchs_encoder_block_sees_the_adapter_in_its_inference_path_too():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval()
    model, x = One(block), torch.randn(2, 5, 12)
    with torch.no_grad():
        before = model(x)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2))
    assert set(bank.layers) == {"m.self_attn", "m.self_attn.out_proj", "m.linear1", "m.linear2"}
    randomise(bank)
    with torch.no_grad():
        inference = model(x)
    torch.testing.assert_close(inference, model(x).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(inference, before)
    veneer.detach(model)
    with torch.no_grad():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "build,options,words",
    [
        (lambda: nn.Embedding(9, 8, max_norm=1.0), {}, "max_norm rewrites"),
        (lambda: nn.MultiheadAttention(8, 2, kdim=6), {}, "sizes differ"),
        (lambda: nn.MultiheadAttention(8, 2), {"dropout": 0.1}, "use dropout: 0"),
        (lambda: nn.Embedding(9, 8), {"invocation": [1]}, "defined for linears only"),
        (lambda: nn.LayerNorm(8), {}, "a LayerNorm, which cannot be adapted"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(build, options, words):
    model = One(nn.Sequential(build(), nn.Linear(8, 8)))
    with pytest.raises(TargetError, match=words):
        veneer.attach(model, veneer.AdapterConfig(rank=2, target_modules=["0"], **options))


@pytest.mark.parametrize(
    "options,words",
    [
        ({"dora": True, "lora_bias": True}, "lora_bias is not defined with dora"),
        ({"dora": True, "invocation": [3]}, r"invocation \(aLoRA\) is not defined with dora"),
        ({"target_parameters": ["w"], "dropout": 0.1}, "without|go without dora"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_combinations_that_have_no_meaning_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        veneer.AdapterConfig(**options)


def test_merging_twice_and_working_while_merged():
    model, bank, x = make("linear")
    live, alone = model(*x), None
    with bank.disabled():
        alone = model(*x)
    bank.merge()
    bank.merge()
    torch.testing.assert_close(model(*x), live, rtol=1e-4, atol=1e-4)
    with bank.disabled():
        assert torch.equal(model(*x), alone)
    torch.testing.assert_close(model(*x), live, rtol=1e-4, atol=1e-4)
    for call in (lambda: bank.activate("default"), lambda: bank.remove("default"),
                 lambda: veneer.attach(model, veneer.AdapterConfig(rank=2), name="b")):  # fmt: skip
        with pytest.raises(AdapterStateError, match="unmerge"):
            call()
    bank.unmerge()
    with pytest.raises(AdapterStateError, match="nothing is merged"):
        bank.unmerge()
    bank.merge()
    veneer.detach(model)
    assert torch.equal(model(*x), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit_of_a_low_precision_base(dtype):
    model = One(nn.Linear(33, 17).to(dtype))
    before = model.m.weight.clone()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4))
    randomise(bank)
    bank.merge()
    wanted = (before.float() + bank.layers["m"].delta("default")).to(dtype)
    assert torch.equal(bank.layers["m"].base_layer.weight, wanted)
    bank.unmerge()
    assert torch.equal(bank.layers["m"].base_layer.weight, before)


def test_scaling_follows_rslora_and_patterns():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = veneer.AdapterConfig(rank=4, alpha=6, rslora=True, rank_pattern={"1": 2}, alpha_pattern={"0": 3})
    bank = veneer.attach(model, config)
    assert bank.layers["0"].scaling["default"] == pytest.approx(3 / 2)
    assert bank.layers["1"].scaling["default"] == pytest.approx(6 / math.sqrt(2))


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"lora_bias": True}], ids=["lora", "dora", "lora_bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_factors_over_a_bfloat16_base(kind, options):
    """The output keeps the base's dtype, stays near the float32 one, and every factor gets its gradient."""
    if kind == "attention" or kind == "embedding" and "lora_bias" in options:
        pytest.skip("an attention holds an adapted layer inside; lora_bias is not defined for embeddings")
    model, bank, x = make(kind, **options)
    wanted = model(*x)
    model.m.base_layer.bfloat16()
    low = model(*(part.bfloat16() if part.is_floating_point() else part for part in x))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), wanted, rtol=0.03, atol=0.03 * float(wanted.detach().abs().max()))
    low.float().square().sum().backward()
    assert all(
        p.grad is not None and p.dtype == p.grad.dtype == torch.float32 for p in bank.parameters("default").values()
    )
    bank.merge()
    assert model(*(part.bfloat16() if part.is_floating_point() else part for part in x)).dtype == torch.bfloat16

"""Every start against its written definition, on tiny models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from init_cases import RANK, SPECTRAL, batches, overlap, randn, same_up_to_sign, starts
from torch import nn

from conftest import tiny_llama
from veneer.adapter.attach import attach, attach_blank, detach
from veneer.adapter.frozen import weight_of
from veneer.adapter.init import DATA_DRIVEN, start
from veneer.adapter.init.calibration import Covariance, collect_inputs, weight_gradients
from veneer.adapter.init.eva import StreamedPCA, redistribute
from veneer.adapter.init.spectral import corda, loftq, lora_ga, low_rank_svd, olora, pissa
from veneer.adapter.targets import select
from veneer.base.quant import quantise
from veneer.config import AdapterConfig, TrainConfig
from veneer.errors import ConfigError

pytest_plugins = ["init_cases"]


@pytest.mark.parametrize("shape", [(37, 23), (23, 37)])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_pissa_takes_the_best_part_of_the_weight(shape, scale):
    weight = randn(*shape)
    lora_A, lora_B = pissa(weight, 5, scale, None, None)
    left = torch.linalg.svdvals(weight.double())[5:].square().sum().sqrt()
    assert (weight - scale * lora_B @ lora_A).norm() == pytest.approx(float(left), rel=1e-4)
    assert torch.allclose(lora_A.norm(dim=1), lora_B.norm(dim=0), rtol=1e-4)  # the singular value is shared evenly


def test_olora_is_orthonormal_and_exact_at_full_rank():
    weight = randn(19, 31)
    lora_A, lora_B = olora(weight, 19)
    assert torch.allclose(lora_B.t() @ lora_B, torch.eye(19), atol=1e-5)
    assert torch.allclose(lora_B @ lora_A, weight, atol=1e-4)
    some_A, some_B = olora(weight, 6)
    assert torch.equal(some_A, lora_A[:6]) and torch.equal(some_B, lora_B[:, :6])


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_splits_the_weight_as_its_inputs_use_it(method):
    """‖s·B·A·C‖ is the root of the summed squares of the r largest (smallest) singular values of W·C."""
    weight, x = randn(21, 17), randn(400, 17, seed=1) * torch.linspace(0.2, 2, 17)
    covariance = x.t() @ x / 400
    lora_A, lora_B = corda(weight, covariance, 5, 0.7, method)
    damped = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(17)
    s = torch.linalg.svdvals((weight @ damped).double())
    s = s[:5] if method == "ipm" else s[-5:]
    assert (0.7 * lora_B @ lora_A @ damped).norm() == pytest.approx(float(s.square().sum().sqrt()), rel=1e-3)


def test_corda_makes_a_singular_covariance_invertible():
    x = randn(3, 40)
    lora_A, lora_B = corda(randn(30, 40, seed=1), x.t() @ x, 4, 1.0, "ipm")
    assert lora_A.isfinite().all() and lora_B.isfinite().all()
    with pytest.raises(ConfigError, match="cannot be inverted"):
        corda(randn(30, 40), torch.full((40, 40), math.nan), 4, 1.0, "ipm")


def test_loftq_takes_the_best_part_of_the_error():
    weight = randn(33, 21)
    quantised = (weight * 2).round() / 2
    lora_A, lora_B = loftq(weight, quantised, 6, 1.5)
    left = torch.linalg.svdvals((weight - quantised).double())[6:].square().sum().sqrt()
    assert (weight - quantised - 1.5 * lora_B @ lora_A).norm() == pytest.approx(float(left), rel=1e-4)


def test_lora_ga_directions_and_scales():
    gradient, weight, r = randn(40, 28), randn(40, 28, seed=1), 4
    u, s, vh = torch.linalg.svd(gradient)

    def got(**options):
        return lora_ga(gradient, weight, 7, 0.5, torch.Generator().manual_seed(0), **options)  # 4r = 28: no sketch

    r = 7
    for direction, rows, columns in (
        ("ArB2r", range(r), range(r, 2 * r)),
        ("A2rBr", range(r, 2 * r), range(r)),
        ("ArBr", range(1, 2 * r, 2), range(0, 2 * r, 2)),
    ):
        lora_A, lora_B = got(direction=direction, scale="unit")
        same_up_to_sign(lora_A, vh[list(rows)])
        same_up_to_sign(lora_B.t(), (u[:, list(columns)] * s[list(columns)]).t())
    unit_A, unit_B = got(scale="unit")
    stable_A, stable_B = got(scale="stable", gamma=9.0)
    assert torch.allclose(stable_B, unit_B * 40**0.25 / 3) and torch.equal(stable_A, unit_A)
    gd_A, gd_B = got(scale="gd_scale")
    assert torch.allclose(gd_A, unit_A * 2) and torch.allclose(gd_B, unit_B * 2)
    _, svd_B = got(scale="weight_svd")
    assert svd_B.norm(dim=0)[0] == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=0.02)
    random_A, random_B = got(direction="random", scale="unit")
    assert ((random_A @ vh[: 2 * r].t()).square().sum(1) > 0.999).all() and random_B.shape == (40, r)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 8), st.integers(0, 99))
def test_low_rank_svd_is_exact_for_low_rank(m, n, rank, seed):
    rank = min(rank, m, n)
    matrix = randn(m, rank, seed=seed) @ randn(rank, n, seed=seed + 1)
    u, s, vh = low_rank_svd(matrix, rank, 2, torch.Generator().manual_seed(seed))
    assert torch.allclose(u * s @ vh, matrix, atol=1e-3 * float(matrix.norm()))
    assert torch.allclose(u.t() @ u, torch.eye(rank), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 99))
def test_streamed_pca_of_batches_is_the_pca_of_all_rows(sizes, seed):
    """Exact while as many components are kept as there are dimensions."""
    rows = randn(sum(sizes) + 3, 9, seed=seed) * torch.linspace(0.5, 3, 9) + 5
    pca = StreamedPCA(9)
    for part in rows.split([*sizes, 3]):
        pca.update(part)
    centred = (rows - rows.mean(0)).double()
    s = torch.linalg.svdvals(centred)[: len(pca.singular)]
    assert torch.allclose(pca.mean, rows.mean(0), atol=1e-4) and pca.rows == len(rows)
    assert torch.allclose(pca.singular[: len(s)].double(), s, atol=1e-3 * float(s[0]))
    assert torch.allclose(pca.explained[: len(s)].double(), s**2 / centred.square().sum(), atol=1e-4)


def test_streamed_pca_finds_a_few_strong_directions():
    strong = torch.linalg.qr(randn(60, 4)).Q.t()
    rows = randn(500, 4, seed=1) * torch.tensor([9.0, 7.0, 5.0, 3.0]) @ strong + 0.1 * randn(500, 60, seed=2)
    pca = StreamedPCA(4, torch.Generator().manual_seed(0))
    for part in rows.split(83):
        pca.update(part)
    assert overlap(pca.vectors, strong) > 0.99


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), min_size=1, max_size=6), st.data())
def test_redistributed_ranks_keep_the_largest_shares(shares, data):
    shares = [sorted(s, reverse=True) for s in shares]
    budget = data.draw(st.integers(0, sum(map(len, shares))))
    ranks = redistribute([torch.tensor(s) for s in shares], budget)
    assert sum(ranks) == budget
    kept = [v for s, r in zip(shares, ranks) for v in s[:r]]
    left = [v for s, r in zip(shares, ranks) for v in s[r:]]
    assert not kept or not left or min(kept) >= max(left)


def test_gradients_are_autograds_and_the_model_is_as_before(decaying_llama):
    """The mean over batches, in eval mode, while some parameters train and others do not."""
    config = AdapterConfig(rank=4)
    reference = copy.deepcopy(decaying_llama).requires_grad_(True)
    for batch in batches():
        (reference(**batch).loss / len(batches())).backward()
    decaying_llama.train()
    decaying_llama.model.norm.weight.requires_grad_(True)
    before = {name: p.clone() for name, p in decaying_llama.named_parameters()}
    targets = select(decaying_llama, config)
    for target, gradient in zip(targets, weight_gradients(decaying_llama, targets, batches()), strict=True):
        expected = reference.get_submodule(target.name).weight.grad
        assert torch.allclose(gradient, expected, atol=1e-5 * float(expected.abs().max())), target.name
    assert all(module.training for module in decaying_llama.modules())
    assert [n for n, p in decaying_llama.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in decaying_llama.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decaying_llama.modules())


def test_inputs_are_shared_and_padding_is_left_out(decaying_llama):
    class Rows:
        def __init__(self):
            self.seen = []

        def update(self, x):
            self.seen.append(x)

    config, data = AdapterConfig(rank=4), batches(2)
    padded = {
        "input_ids": torch.cat([torch.cat([b["input_ids"], torch.zeros(1, 5).long()], 1) for b in data]),
        "attention_mask": torch.cat([torch.ones(2, 23), torch.zeros(2, 5)], 1).long(),
    }
    targets = select(decaying_llama, config)
    plain = collect_inputs(decaying_llama, targets, data, Rows)
    masked = collect_inputs(decaying_llama, targets, [padded], Rows)
    few = collect_inputs(decaying_llama, targets, data, Rows, supervised_only=True)
    by_name = {t.name: rows for t, rows in zip(targets, plain)}
    attention = [by_name[f"model.layers.1.self_attn.{n}_proj"] for n in "qkv"]
    assert attention[0] is attention[1] is attention[2] and len({id(rows) for rows in plain}) == 8
    for a, b, c in zip(plain, masked, few):
        assert [len(x) for x in a.seen] == [23, 23] and [len(x) for x in c.seen] == [17, 17]
        assert torch.allclose(torch.cat(a.seen), torch.cat(b.seen), atol=1e-5)
        assert torch.equal(a.seen[0][6:], c.seen[0])


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", *SPECTRAL, "eva"])
def test_a_seed_gives_the_same_start_on_any_weight_type(init, decaying_llama):
    options = {"pissa_iterations": 3} if init == "pissa" else {}
    first, again = (starts(decaying_llama, batches(), init=init, init_options=options) for _ in range(2))
    half = starts(copy.deepcopy(decaying_llama).bfloat16(), batches(), init=init, init_options=options)
    for name, one in first.items():
        assert torch.equal(one.lora_A, again[name].lora_A) and torch.equal(one.lora_B, again[name].lora_B)
        for factor in (one.lora_A, half[name].lora_A, one.lora_B, half[name].lora_B):
            assert factor.dtype == torch.float32 and factor.isfinite().all()
        assert one.lora_A.shape[1] == decaying_llama.get_submodule(name).in_features


def test_what_cannot_start_is_refused_with_the_reason(decaying_llama):
    for init in ("eva", "corda", "lora_ga"):
        with pytest.raises(ConfigError, match="computed from data"):
            starts(decaying_llama, init=init)
    with pytest.raises(ConfigError, match="even rank.*q_proj has 3"):
        starts(decaying_llama, init="orthogonal", rank=3)
    with pytest.raises(ConfigError, match="k_proj has 12: use at most rank 6"):
        starts(decaying_llama, batches(), init="lora_ga", rank=7)
    with pytest.raises(ConfigError, match="not quantised"):
        starts(decaying_llama, init="loftq")
    with pytest.raises(ConfigError, match="2 calibration tokens and 8 are needed"):
        starts(decaying_llama, batches(1, 8), init="eva")
    with pytest.raises(ConfigError, match="no loss"):
        starts(decaying_llama, [{"input_ids": b["input_ids"]} for b in batches()], init="lora_ga")
    for what in ("calibration", "float_weights"):
        with pytest.raises(ConfigError, match=f"{what} has no effect with init 'pissa'"):
            start(decaying_llama, [], AdapterConfig(init="pissa"), **{what: []})
    with pytest.raises(ConfigError, match="no calibration batch reached 14"):
        starts(decaying_llama, [], init="corda")


def test_an_option_of_another_init_is_refused():
    with pytest.raises(ConfigError, match="'init_options.eva_rho': has no effect with init 'pissa'"):
        AdapterConfig(init="pissa", init_options={"eva_rho": 3})
    with pytest.raises(ConfigError, match="'adapter.init_options.examples': has no effect"):
        TrainConfig(data="x", out="y", adapter={"init_options": {"examples": 3}})
    config = AdapterConfig(init="eva", init_options={"eva_rho": 3, "examples": 5})
    assert AdapterConfig(**config.model_dump()) == config


def test_covariance_is_the_mean_over_batches():
    covariance, x, y = Covariance(), randn(7, 5), randn(4, 5, seed=1)
    for part in (x, y, x[:0]):
        covariance.update(part)
    x, y = x / x.max(), y / y.max()
    assert torch.allclose(covariance.mean, (x.t() @ x + y.t() @ y) / 2, atol=1e-6)


def test_models_start_where_the_base_stands():
    """W − s·B·A + s·B·A is W, on a model whose linears are not square, for every start that changes the base."""
    model = tiny_llama(tie_word_embeddings=False)
    for init in SPECTRAL:
        for name, one in starts(model, batches(), init=init).items():
            weight = model.get_submodule(name).weight
            assert one.changes_base and one.alpha is None
            assert one.lora_A.shape == (RANK, weight.shape[1]) and one.lora_B.shape == (weight.shape[0], RANK)


def test_loftq_is_computed_from_the_weights_before_quantisation():
    """W − Q of a real NF4 base, whose error after the start is that of the best rank-r approximation."""
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=4)
    config = AdapterConfig(rank=4, alpha=6, init="loftq")
    original = {t.name: t.module.weight.detach().clone() for t in select(model, AdapterConfig(rank=4))}
    model = quantise(model, "nf4", torch.float32, "cpu")
    targets = select(model, config)
    for target, one in zip(targets, start(model, targets, config, float_weights=original.get), strict=True):
        error = original[target.name] - weight_of(target.module)
        left = torch.linalg.svdvals(error.double())[4:].square().sum().sqrt()
        assert not one.changes_base
        assert (error - 1.5 * one.lora_B @ one.lora_A).norm() == pytest.approx(float(left), rel=1e-3)
    with pytest.raises(ConfigError, match="needs the weights from before"):
        start(model, targets, config)
    with pytest.raises(ConfigError, match="q_proj is not what was quantised"):
        start(model, targets, config, float_weights=lambda name: -original[name])


def test_a_module_that_is_left_no_rank_is_not_adapted():
    """As EVA may leave one: the adapter is without it in every respect, its bias included."""
    decaying_llama = tiny_llama(attention_bias=True)
    names = [target.name for target in select(decaying_llama, AdapterConfig(rank=4))]
    config = AdapterConfig(rank=4, alpha=6, rslora=True, init="eva", bias="lora_only")
    bank = attach_blank(decaying_llama, config, dict.fromkeys(names[1:], 3))
    assert list(bank.layers) == bank.entries["default"].targets == names[1:]
    assert type(decaying_llama.get_submodule(names[0])) is nn.Linear
    assert set(bank.entries["default"].biases) == {f"{n}.bias" for n in names[1:] if "self_attn" in n}
    assert {layer.rank["default"] for layer in bank.layers.values()} == {3}
    assert all(layer.scaling["default"] == pytest.approx(3.0) for layer in bank.layers.values())


def test_kinds_that_an_init_is_not_for_are_refused_by_name(decaying_llama):
    for init in ("orthogonal", "pissa", "olora", "loftq", "corda"):
        config = AdapterConfig(rank=4, init=init, target_modules=["embed_tokens", "q_proj"], tied_head="embedding")
        with pytest.raises(
            ConfigError, match=f"{init}' is for linear layers and model.embed_tokens is of kind embedding"
        ):
            start(decaying_llama, select(decaying_llama, config), config)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    config = AdapterConfig(rank=2, init="pissa", target_modules=["0", "2"])
    with pytest.raises(ConfigError, match="0 is of kind conv: exclude it"):
        start(model, select(model, config), config)


def test_embeddings_and_convolutions_start_as_pefts(decaying_llama):
    """Embeddings: A = 0 and B normal; convolutions: A uniform within 1/√(channels·kernel), B = 0."""
    config = AdapterConfig(rank=4, init="gaussian", target_modules=["embed_tokens"], tied_head="embedding")
    (one,) = start(decaying_llama, select(decaying_llama, config), config, seed=0)
    assert not one.lora_A.any() and one.lora_A.shape == (4, 420)
    assert one.lora_B.shape == (36, 4) and 0.8 < float(one.lora_B.std()) < 1.2
    model = nn.Sequential(nn.Conv2d(6, 8, 5, groups=2))
    config = AdapterConfig(rank=4, target_modules=["0"])
    (one,) = start(model, select(model, config), config, seed=0)
    assert one.lora_A.shape == (4, 150) and one.lora_B.shape == (8, 2) and not one.lora_B.any()
    assert 0.9 < float(one.lora_A.abs().max()) * 150**0.5 <= 1


@pytest.mark.parametrize("init", [*SPECTRAL, "eva"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_attached_adapter_starts_at_the_bases_output(decaying_llama, init, dora):
    """To rounding, whatever alpha, with every base weight untouched; and its factors do act when they move."""
    data = batches() if init in DATA_DRIVEN else None
    ids, weights = batches()[0]["input_ids"], {n: p.clone() for n, p in decaying_llama.named_parameters()}
    before = decaying_llama(ids).logits
    bank = attach(decaying_llama, AdapterConfig(rank=4, alpha=6, init=init, dora=dora), seed=0, calibration=data)
    assert torch.allclose(decaying_llama(ids).logits, before, atol=1e-5 * float(before.abs().max()))
    for layer in bank.layers.values():
        layer.lora_B["default"].data.add_(0.1)
    assert not torch.allclose(decaying_llama(ids).logits, before, atol=1e-2 * float(before.abs().max()))
    detach(decaying_llama)
    assert all(torch.equal(p, weights[n]) for n, p in decaying_llama.named_parameters())

"""Every start against PEFT's own."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch
from init_cases import ALPHA, RANK, batches, overlap, same_up_to_sign, starts
from torch import nn

from veneer.adapter.math import scaling

pytest_plugins = ["init_cases"]


def peft_config(init, **options):
    from peft import LoraConfig

    values = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "init_lora_weights": init}
    return LoraConfig(**values | {"task_type": "CAUSAL_LM"} | options)


def peft_layers(model: nn.Module) -> dict:
    """PEFT's adapted linears by the base's names: lora_A, lora_B, scaling, base weight."""
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layers[name.removeprefix("base_model.model.")] = (
                module.lora_A["default"].weight.data,
                module.lora_B["default"].weight.data,
                module.scaling["default"],
                module.get_base_layer().weight.data,
            )
    return layers


def check_equal_to_peft(model, theirs: dict, mine: dict, rslora: bool = False, rtol: float = 1e-3) -> None:
    """The same modules, s, s·B·A, factors up to the sign of each component, and W_res + s·B·A = W."""
    assert set(theirs) == set(mine)
    for name, (lora_A, lora_B, scale, residual) in theirs.items():
        one, weight = mine[name], model.get_submodule(name).weight
        assert one.changes_base and scale == pytest.approx(scaling(RANK, ALPHA, rslora))
        product = scale * one.lora_B @ one.lora_A
        assert (product - scale * lora_B @ lora_A).norm() <= rtol * product.norm()
        assert torch.allclose(residual + product, weight, atol=rtol * float(weight.abs().max()))
        same_up_to_sign(one.lora_A, lora_A, rtol)
        same_up_to_sign(one.lora_B.t(), lora_B.t(), rtol)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_are_pefts(decaying_llama, init, rslora):
    from peft import get_peft_model

    theirs = peft_layers(get_peft_model(copy.deepcopy(decaying_llama), peft_config(init, use_rslora=rslora)))
    check_equal_to_peft(decaying_llama, theirs, starts(decaying_llama, init=init, rslora=rslora), rslora)


def test_fast_pissa_is_pefts(decaying_llama):
    """After some iterations the random start no longer matters."""
    from peft import get_peft_model

    theirs = peft_layers(get_peft_model(copy.deepcopy(decaying_llama), peft_config("pissa_niter_32")))
    mine = starts(decaying_llama, init="pissa", init_options={"pissa_iterations": 32})
    for name, (lora_A, lora_B, *_) in theirs.items():
        product = mine[name].lora_B @ mine[name].lora_A
        assert (product - lora_B @ lora_A).norm() <= 1e-3 * product.norm(), name


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts(decaying_llama, method, monkeypatch):
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # PEFT wants attrs here, for its dataclass, unannounced
    from peft import get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, config = copy.deepcopy(decaying_llama), peft_config("corda", corda_config=CordaConfig(corda_method=method))
    config.target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    preprocess_corda(model, config, run_model=lambda: [model(input_ids=b["input_ids"]) for b in batches()])
    theirs = peft_layers(get_peft_model(model, config))
    mine = starts(decaying_llama, batches(), init="corda", init_options={"corda_method": method})
    check_equal_to_peft(decaying_llama, theirs, mine, rtol=1e-2)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_is_pefts(decaying_llama, direction, scale):
    pytest.importorskip("peft.tuners.lora.loraga", reason="this PEFT has no LoRA-GA")
    from peft import get_peft_model
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    model = copy.deepcopy(decaying_llama)
    options = LoraGAConfig(direction=direction, scale=scale, stable_gamma=9)
    config = peft_config("lora_ga", lora_ga_config=options)
    config.target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    preprocess_loraga(model, config, lambda: [model(**b).loss.backward() for b in batches()])
    torch.manual_seed(0)
    theirs = peft_layers(get_peft_model(model, config))
    chosen = {"lora_ga_direction": direction, "lora_ga_scale": scale}
    gamma = {"lora_ga_gamma": 9} if scale == "stable" else {}
    mine = starts(decaying_llama, batches(), init="lora_ga", init_options=chosen | gamma)
    assert set(theirs) == set(mine)
    for name, (lora_A, lora_B, *_) in theirs.items():  # both are randomised: single directions may turn a little
        for a, b in ((mine[name].lora_A, lora_A), (mine[name].lora_B.t(), lora_B.t())):
            assert a.norm() == pytest.approx(float(b.norm()), rel=0.02), name
            assert overlap(a, b) > 0.98, name


@pytest.mark.parametrize(
    "options", [{}, {"eva_whiten": True}, {"eva_supervised_only": False}, {"eva_rho": 1.0}], ids=str
)
def test_eva_is_pefts(decaying_llama, options):
    """On one batch, which PEFT goes over until nothing changes. Targets with one input may swap their ranks."""
    from peft import get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import EvaConfig

    data = [{k: torch.cat([b[k] for b in batches(12)]) for k in ("input_ids", "labels")}]
    theirs_options = EvaConfig(
        rho=options.get("eva_rho", 2.0),
        whiten=options.get("eva_whiten", False),
        use_label_mask=options.get("eva_supervised_only", True),
    )
    model = get_peft_model(copy.deepcopy(decaying_llama), peft_config("eva", eva_config=theirs_options))
    initialize_lora_eva_weights(model, data, show_progress_bar=False)
    theirs, mine = peft_layers(model), starts(decaying_llama, data, init="eva", init_options=options)

    def group(name):
        return name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")

    def ranks(found):
        grouped = {}
        for name, rank in found:
            grouped.setdefault(group(name), []).append(rank)
        return {name: sum(values) for name, values in grouped.items()}

    found, expected = (
        ranks((n, len(one.lora_A)) for n, one in mine.items()),
        ranks((n, len(t[0])) for n, t in theirs.items()),
    )
    assert sum(found.values()) == sum(expected.values()) == RANK * len(mine)
    assert all(abs(found[name] - expected[name]) <= 1 for name in expected)
    if "eva_whiten" in options:  # PEFT divides in place, once for each target of an input: compare those with their own
        theirs = {name: pair for name, pair in theirs.items() if name.endswith(("o_proj", "down_proj"))}
    for name, (lora_A, lora_B, scale, _) in theirs.items():
        one, k = mine[name], min(3, len(lora_A), len(mine[name].lora_A))
        assert not one.changes_base and not one.lora_B.any() and not lora_B.any()
        assert scaling(len(one.lora_A), one.alpha) == pytest.approx(scale)
        assert overlap(one.lora_A[:k], lora_A[:k]) > 0.98
        twice = 2**0.25 if "eva_whiten" in options else 1.0  # PEFT has gone over the batch twice: S is √2 as large
        assert one.lora_A[:k].norm() == pytest.approx(twice * float(lora_A[:k].norm()), rel=0.02)

"""Quantised bases: loading, what stays float, fingerprints, training, and merging into the float weights."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from typing import get_args

import pytest
import torch
from torch import nn

import veneer
from conftest import tiny_llama
from quant_layers import LOADED, STORED, make_layer
from veneer.adapter.frozen import is_quantised, shape_of, weight_of
from veneer.base import quant as quant_module
from veneer.base.fingerprint import Fingerprint, fingerprint, mismatch
from veneer.base.load import load_base
from veneer.base.quant import EXTRAS, quantised_linear
from veneer.config import Quant
from veneer.errors import AdapterStateError, BaseModelError, ConfigError, TargetError, WrongBaseError
from veneer.formats.peft import base_record
from veneer.formats.verify import PROMPTS, logit_error

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "tie_word_embeddings": False}
"""Widths that NF4's blocks of 64 divide."""
IDS = torch.tensor([[3, 5, 8, 13, 21, 34]])


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("quant")
    tiny_llama(initializer_range=0.2, **SIZES).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def randomise(bank, name="default"):
    torch.manual_seed(7)
    for parameter in bank.parameters(name).values():
        parameter.data.normal_(0, 0.05)


def test_names_are_the_same_everywhere():
    assert set(get_args(Quant)) == {"none", *EXTRAS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LOADED)
def test_linears_are_quantised_and_all_else_keeps_its_dtype(base_dir, kind, dtype):
    model, _ = load_base(base_dir, quant=kind, dtype=dtype, device="cpu")
    plain, _ = load_base(base_dir, dtype=dtype, device="cpu")
    assert Counter(is_quantised(m) for m in model.modules() if shape_of(m)) == {True: 14, False: 1}
    assert type(model.lm_head) is nn.Linear and model.veneer_base.quant == kind
    for name, parameter in plain.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if is_quantised(module):
            with torch.no_grad():
                twin = quantised_linear(plain.get_submodule(name.rpartition(".")[0]), kind, dtype, "cpu")
                assert torch.equal(weight_of(module), weight_of(twin)) and type(module) is type(twin)
            error = (weight_of(module).float() - parameter.float()).abs().max()
            assert 0 < error < 0.2 * parameter.abs().max()
        else:
            kept = model.get_parameter(name)
            assert kept.dtype == dtype and torch.equal(kept, parameter)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    error = (logits(model) - logits(plain)).abs().mean() / logits(plain).abs().mean()
    assert 0 < error < (0.05 if "int8" in kind else 0.5)


def test_a_tied_head_stays_the_embedding(tmp_path, tokenizer):
    tiny_llama(**SIZES | {"tie_word_embeddings": True}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for kind in LOADED:
        model, _ = load_base(tmp_path, quant=kind, device="cpu")
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "kind, error, word",
    [("int3", ConfigError, "nf4"), ("int4-torchao", ConfigError, "GPU"), ("NF4", ConfigError, "use none, nf4")],
)
def test_what_cannot_be_is_said(base_dir, kind, error, word):
    with pytest.raises(error, match=word):
        load_base(base_dir, quant=kind, device="cpu")


@pytest.mark.parametrize("kind, extra", [("nf4", "quant"), ("int8-torchao", "torchao"), ("hqq", "hqq")])
def test_a_missing_library_is_named_with_its_extra(base_dir, monkeypatch, kind, extra):
    monkeypatch.setattr(quant_module, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match=rf"pip install 'veneer\[{extra}\]'"):
        load_base(base_dir, quant=kind, device="cpu")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_base_stored_quantised_names_what_it_needs_and_takes_no_quant(base_dir, tmp_path, tokenizer, method):
    config = json.loads((base_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"veneer\[gptq\]"):
        load_base(tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="leave quant out"):
        load_base(tmp_path, quant="nf4", device="cpu")


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8-torchao"])
def test_a_base_stored_quantised_loads_as_it_was(base_dir, tmp_path, kind):
    model, tokenizer = load_base(base_dir, quant=kind, device="cpu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_base(tmp_path, device="cpu")
    assert again.veneer_base.quant == {"int8-torchao": "torchao"}.get(kind, "bitsandbytes")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    bank = veneer.attach(again, veneer.AdapterConfig(rank=4))
    assert len(bank.layers) == 14


def test_a_width_that_bitsandbytes_computes_wrongly_is_refused(tmp_path, tokenizer):
    tiny_llama(hidden_size=96).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="blocks of 64 do not divide"):
        load_base(tmp_path, quant="nf4", device="cpu")
    assert load_base(tmp_path, quant="int8", device="cpu")[0].veneer_base.quant == "int8"


@pytest.mark.parametrize("kind", LOADED)
def test_an_adapted_quantised_model_is_the_float_one_with_the_dequantised_weights(base_dir, kind):
    """Logits and every gradient, against a plain model that holds the dequantised weights."""
    found = []
    for dequantise in (False, True):
        model, _ = load_base(base_dir, quant=kind, device="cpu")
        if dequantise:
            for parent in list(model.modules()):
                for name, child in list(parent.named_children()):
                    if is_quantised(child):
                        d_out, d_in = shape_of(child)
                        plain = nn.Linear(d_in, d_out, bias=False)
                        plain.weight = nn.Parameter(weight_of(child).float(), requires_grad=False)
                        setattr(parent, name, plain)
        bank = veneer.attach(model, veneer.AdapterConfig(rank=4, alpha=8))
        randomise(bank)
        assert all(p.dtype == torch.float32 for p in bank.parameters("default").values())
        model.train()
        out = model(input_ids=IDS).logits
        out.square().mean().backward()
        found.append((out.detach(), {n: p.grad for n, p in bank.parameters("default").items()}))
        assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for name, grad in found[1][1].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(found[0][1][name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("kind", (*LOADED, *STORED))
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"dropout": 0.5}, {"dora": True}], ids=str)
def test_every_quantised_linear_can_be_adapted(kind, options):
    """Alone in a tree: with the adapter off it is itself, with it on it adds the update, and detach returns it."""
    layer = make_layer(kind, sizes=(40, 128))
    model, x = nn.Sequential(layer).eval(), torch.randn(3, shape_of(layer)[1])
    before = model(x).detach()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2, **options))
    scale = float(before.abs().max())
    tolerance = 0.02 if kind == "int8" else 1e-5  # LLM.int8() rounds its input where no adapter acts
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=tolerance * scale)
    randomise(bank)
    x.requires_grad_()
    y = model(x)
    wanted = x @ (weight_of(layer) + bank.layers["0"].delta("default")).t() + layer.bias
    if "lora_bias" in options:
        wanted = wanted + 16 * bank.layers["0"].lora_bias["default"]  # s = alpha / rank = 32 / 2
    torch.testing.assert_close(y, wanted, rtol=0, atol=tolerance * scale)
    if "dropout" in options:
        y = model.train()(x)
        assert not torch.allclose(y, wanted, rtol=0, atol=tolerance * scale)
    y.sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in bank.parameters("default").values())
    with bank.disabled():
        torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=0)
    assert veneer.detach(model)[0] is layer


@pytest.mark.parametrize("kind", LOADED)
def test_a_quantised_base_generates_with_and_without_its_adapter(base_dir, kind):
    model, tokenizer = load_base(base_dir, quant=kind, device="cpu")
    randomise(veneer.attach(model, veneer.AdapterConfig(rank=4)))
    prompts = [[{"role": "user", "content": text}] for text in ("hello", "what is the date?")]
    adapted = veneer.generate(model, tokenizer, prompts, max_new_tokens=5)
    with veneer.get_bank(model).disabled():
        plain = veneer.generate(model, tokenizer, prompts, max_new_tokens=5)
    assert [a.tokens > 0 for a in adapted + plain] == [True] * 4 and adapted != plain
    assert adapted == veneer.generate(model, tokenizer, prompts, max_new_tokens=5)


def test_a_quantised_module_cannot_be_trained_in_full(base_dir):
    model, _ = load_base(base_dir, quant="nf4", device="cpu")
    with pytest.raises(TargetError, match="quantised"):
        veneer.attach(model, veneer.AdapterConfig(target_modules=["q_proj"], modules_to_save=["up_proj"]))


def test_the_report_counts_weights_and_not_packed_bytes(base_dir):
    totals = set()
    for kind in (None, *LOADED):
        model, _ = load_base(base_dir, quant=kind, device="cpu")
        totals.add(veneer.attach(model, veneer.AdapterConfig(rank=4)).report().total_parameters)
    assert len(totals) == 1


def test_fingerprints_of_one_base_agree_however_it_is_quantised(base_dir):
    other = fingerprint(tiny_llama(seed=1, initializer_range=0.2, **SIZES))
    marks = [fingerprint(load_base(base_dir, quant=kind, device="cpu")[0]) for kind in (None, *LOADED)]
    for mine in marks:
        assert Fingerprint.from_dict(json.loads(json.dumps(mine.as_dict()))) == mine
        assert [mismatch(mine, theirs) for theirs in marks] == [None] * len(marks)
        assert "other weights" in mismatch(mine, other) and "other weights" in mismatch(other, mine)
    assert all(None in mark.samples for mark in marks[1:])


def test_a_fingerprint_of_an_earlier_version_is_compared_as_far_as_it_goes(base_dir):
    plain, packed = (fingerprint(load_base(base_dir, quant=kind, device="cpu")[0]) for kind in (None, "nf4"))
    other = fingerprint(tiny_llama(seed=1, initializer_range=0.2, **SIZES))
    old, wrong = (Fingerprint.from_dict({**m.as_dict(), "anchors": None}) for m in (plain, other))
    assert mismatch(plain, old) is None and mismatch(packed, old) is None
    assert "other weights" in mismatch(plain, wrong) and "other weights" in mismatch(packed, wrong)


def test_adapters_move_between_the_float_base_and_its_quantised_forms(base_dir, tmp_path, tokenizer):
    for source, target in ((None, "nf4"), ("nf4", None), ("nf4", "int8-torchao"), ("hqq", "nf4")):
        model, _ = load_base(base_dir, quant=source, device="cpu")
        randomise(veneer.attach(model, veneer.AdapterConfig(rank=4)))
        path = veneer.save_adapter(model, tmp_path / f"{source}-{target}")
        assert json.loads((path / "veneer.json").read_text())["base"]["quant"] == source
        fresh, _ = load_base(base_dir, quant=target, device="cpu")
        bank = veneer.load_adapter(fresh, path)
        for key, value in bank.parameters("default").items():
            assert torch.equal(value, veneer.get_bank(model).parameters("default")[key])
    tiny_llama(seed=1, initializer_range=0.2, **SIZES).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBaseError):
        veneer.load_adapter(load_base(tmp_path / "other", quant="nf4", device="cpu")[0], path)


def test_the_record_of_a_base_says_how_it_is_quantised(base_dir):
    assert base_record(load_base(base_dir, quant="nf4", device="cpu")[0])["quant"] == "nf4"
    assert base_record(load_base(base_dir, device="cpu")[0])["quant"] is None


def run_config(base_dir, chat_file, out, **more):
    return veneer.TrainConfig(
        model=str(base_dir),
        data=str(chat_file),
        out=str(out),
        adapter={"rank": 4},
        train={"batch_size": 4, "epochs": 2, "lr": 5e-3, "save_every": 2},
        device="cpu",
        **more,
    )


@pytest.mark.parametrize("kind", ["nf4", "int8-torchao"])
def test_a_run_on_a_quantised_base_learns_resumes_and_is_reopened_quantised(base_dir, chat_file, tmp_path, kind):
    from veneer.cli.common import open_adapter

    seen = []
    config = run_config(base_dir, chat_file, tmp_path / "run", quant=kind)
    result = veneer.train(config, observe=seen.append)
    losses = [r["loss"] for r in seen if r["type"] == "train"]
    assert result.stopped == "finished" and losses[-1] < losses[0]
    assert not any("off" in r["text"] for r in seen if r["type"] == "note")
    assert json.loads((tmp_path / "run/provenance.json").read_text())["base"]["quant"] == kind
    assert veneer.train(config, resume=True).steps == result.steps
    options = {"device": "cpu", "dtype": "auto", "force": False}
    assert open_adapter(tmp_path / "run", None, **options).model.veneer_base.quant == kind
    assert open_adapter(tmp_path / "run", None, quant="none", **options).model.veneer_base.quant is None


@pytest.mark.parametrize("adapter", [{"init": "loftq"}, {"init": "pissa"}, {"dora": True}], ids=str)
def test_variants_train_on_a_quantised_base(base_dir, chat_file, tmp_path, adapter):
    seen = []
    config = run_config(base_dir, chat_file, tmp_path / "run", quant="nf4")
    config.adapter = veneer.AdapterConfig(rank=4, **adapter)
    veneer.train(config, observe=seen.append)
    losses = [r["loss"] for r in seen if r["type"] == "train"]
    assert losses[-1] < losses[0]


@pytest.fixture
def adapter_dir(base_dir, tmp_path):
    model, _ = load_base(base_dir, quant="nf4", device="cpu")
    randomise(veneer.attach(model, veneer.AdapterConfig(rank=4, alpha=16)))
    return veneer.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("kind", LOADED)
def test_a_quantised_base_is_not_merged_into(base_dir, adapter_dir, kind):
    model, _ = load_base(base_dir, quant=kind, device="cpu")
    bank = veneer.load_adapter(model, adapter_dir)
    before = logits(model)
    with pytest.raises(AdapterStateError, match="veneer merge"):
        bank.merge()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", [None, "nf4", "int8", "int8-torchao"])
def test_merging_into_the_float_base_reports_each_route(base_dir, adapter_dir, tmp_path, kind):
    report = veneer.merge_into_float(adapter_dir, base_dir, tmp_path / "merged", kind, device="cpu")
    assert report.exact.max < 1e-4 and report.exact.top1 == 1
    model, tokenizer = load_base(tmp_path / "merged", device="cpu")
    float_model, _ = load_base(base_dir, device="cpu")
    veneer.load_adapter(float_model, adapter_dir)
    error = (logits(model) - logits(float_model)).abs()
    assert tokenizer.chat_template and "veneer_bank" not in model.__dict__
    if kind is None:
        assert error.max() < 1e-4 and report.requantised is None and report.naive is None
    else:
        assert any(is_quantised(m) for m in model.modules())
        assert 0 < report.requantised.mean and 0 < report.naive.mean and 0 < report.effect.mean
        assert set(report.to_float) == {"unmerged", "requantised", "naive"}
        written, _ = load_base(tmp_path / "merged", device="cpu")
        ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
        with torch.no_grad():
            found, wanted = (m(input_ids=ids).logits for m in (written, float_model))
        error = logit_error([found[0]], [wanted[0]])
        whole = veneer.merge_into_float(adapter_dir, base_dir, tmp_path / "b", kind, device="cpu", prompts=PROMPTS[:1])
        assert whole.to_float["requantised"].max == pytest.approx(error.max, rel=1e-3)
        assert whole.to_float["requantised"].mean == pytest.approx(error.mean, rel=1e-3)
        shutil.rmtree(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "merged"]


def test_merge_refusals_write_nothing(base_dir, adapter_dir, tmp_path, tokenizer):
    stored, _ = load_base(base_dir, quant="nf4", device="cpu")
    stored.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    out = tmp_path / "merged"
    with pytest.raises(BaseModelError, match="stored quantised"):
        veneer.merge_into_float(adapter_dir, tmp_path / "stored", out, device="cpu")
    with pytest.raises(ConfigError, match="hqq"):
        veneer.merge_into_float(adapter_dir, base_dir, out, "hqq", device="cpu")
    with pytest.raises(ConfigError, match="not empty"):
        veneer.merge_into_float(adapter_dir, base_dir, base_dir, device="cpu")
    assert not out.exists()

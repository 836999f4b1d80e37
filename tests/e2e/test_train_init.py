"""Every initialisation through `veneer train`: what it starts from, what it leaves, and how it resumes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import veneer
from conftest import tiny_llama

pytest_plugins = ["commands"]
TWICE = ["pissa", "olora", "corda", "lora_ga"]


@pytest.fixture
def flags(model_dir, chat_file):
    """Four steps of three examples, a checkpoint after each."""
    short = [x for s in ("train.save_every=1", "train.keep_checkpoints=9") for x in ("--set", s)]
    return ["--model", model_dir, "--data", chat_file, "--rank", 4, "--alpha", 6, "--batch-size", 3, *short]


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["type"] == "train"]


@pytest.mark.parametrize("init", [*TWICE, "eva"])
def test_train_saves_what_peft_loads_and_resumes_to_the_same(cli, flags, tmp_path, model_dir, init, monkeypatch):
    from peft import PeftModel

    run = tmp_path / "run"
    flags = [*flags, "--set", f"adapter.init={init}", "--lr", "1e-3"]
    done = cli("train", *flags, "--out", run)
    assert done.code == 0, done.err
    whole, first = load_file(run / "adapter" / "adapter_model.safetensors"), losses(run)
    base, _ = veneer.load_base(str(model_dir))
    ids = torch.arange(40)[None]
    before = base(input_ids=ids).logits
    veneer.load_adapter(base, run / "adapter")
    after = base(input_ids=ids).logits
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), run / "adapter")
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after, theirs(input_ids=ids).logits, atol=1e-4)
    ranks = [len(v) for k, v in whole.items() if "lora_A" in k]
    assert sum(ranks) == 14 * 4 * (2 if init in TWICE else 1)
    shutil.rmtree(run / "adapter")
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    monkeypatch.setattr("veneer.training.setup.Setup.calibration", None)  # a resumed run must not compute a start
    done = cli("train", "--resume", *flags, "--out", run)
    assert done.code == 0 and "resuming after step 2" in done.err, done.err
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) for k in whole)
    assert losses(run) == first


def test_the_first_loss_is_the_bases(cli, flags, tmp_path):
    first = {}
    for init in ("kaiming", *TWICE, "eva"):
        run = tmp_path / init
        done = cli("train", *flags, "--set", f"adapter.init={init}", "--out", run, "--max-steps", 1)
        assert done.code == 0, done.err
        first[init] = losses(run)[0]
    assert all(loss == pytest.approx(first["kaiming"], abs=1e-4) for loss in first.values()), first


def test_eva_moves_ranks_and_keeps_the_scaling(cli, flags, tmp_path, model_dir):
    run = tmp_path / "run"
    more = [
        "--set",
        "adapter.init=eva",
        "--set",
        "adapter.init_options.eva_rho=3",
        "--set",
        "adapter.init_options.examples=5",
    ]
    done = cli("train", *flags, *more, "--out", run, "--max-steps", 1)
    assert done.code == 0, done.err
    model, _ = veneer.load_base(str(model_dir))
    layers = veneer.load_adapter(model, run / "adapter").layers.values()
    assert len({layer.rank["default"] for layer in layers}) > 1
    assert {round(layer.scaling["default"], 6) for layer in layers} == {1.5}


def test_wrong_settings_are_refused_before_training(cli, flags, tmp_path):
    for settings, reason in (
        (["init=eva", "init_options.examples=1", "init_options.eva_rho=8"], "raise init_options.examples"),
        (["init=loftq"], "not quantised"),
        (["init=orthogonal", "rank=3"], "even rank"),
        (["init=lora_ga", "rank=8"], "at most rank 6"),
        (["init=corda", "init_options.eva_rho=3"], "no effect with init 'corda'"),
        (["init=corda", "init_options.corda_method=kpn"], "ipm"),
    ):
        given = [x for s in settings for x in ("--set", f"adapter.{s}")]
        done = cli("train", *flags, *given, "--out", tmp_path / "run", "--dry-run")
        assert done.code == 2 and reason in done.err, done.err


def test_a_second_adapter_starts_from_the_base_not_from_the_first():
    """EVA sees what the base's modules are given, whatever is active, and leaves the first adapter active as it was."""
    model, plain = tiny_llama(), tiny_llama()
    data = [{"input_ids": torch.arange(1, 60)[None], "labels": torch.arange(1, 60)[None]}]
    config = veneer.AdapterConfig(rank=4, init="eva")
    veneer.attach(plain, config, seed=0, calibration=data)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, init="orthogonal"), name="first", seed=1)
    with torch.no_grad():
        for layer in bank.layers.values():
            layer.lora_B["first"].normal_()
    bank = veneer.attach(model, config, name="second", seed=0, calibration=data)
    assert bank.active == {"second": 1.0}
    for name, layer in veneer.get_bank(plain).layers.items():
        assert torch.equal(bank.layers[name].lora_A["second"], layer.lora_A["default"])

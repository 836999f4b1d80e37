"""veneer plan through the command line: a budget, cards, JSON, mistakes in one line."""

from __future__ import annotations

import json
import re

import pytest

from veneer.plan.devices import CARDS

pytest_plugins = ["commands"]

EIGHT_B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EIGHT_B))
    return tmp_path


def test_a_plan_from_a_configuration_alone(cli, model):
    done = cli("plan", model, "--vram", "24GB", "--ram", "64GB", "--rank", "8", "--device", "auto")
    assert done.code == 0 and "8.03 B parameters, 32,768 tokens a step" in done.out
    assert "not taken" in done.out and re.search(r"→ +(none|nf4) +(off|host|disk)", done.out)


def test_as_json(cli, model):
    found = json.loads(cli("plan", model, "--vram", "24GB", "--ram", "64GB", "--json", "--quant", "nf4").out)
    assert found["chosen"]["need"]["total"] < 24e9 and found["chosen"]["setting"]["quant"] == "nf4"
    assert found["budget"] == {"device": 24e9, "host": 64e9, "cuda": True, "context": None}
    settings = ("--set", "train.checkpointing=recompute", "--seq", "512", "--tokens-per-step", "4096")
    fixed = json.loads(cli("plan", model, "--vram", "24GB", "--json", *settings).out)["chosen"]["setting"]
    assert (fixed["dial"], fixed["sequence"], fixed["tokens"]) == ("recompute", 512, 4096)


def test_what_is_left_of_the_memory_keeps_blocks_on_the_device(cli, model):
    """Few tokens a step, so that the copies of an unquantised base are not hidden, on 12 GB of which a few would do."""
    options = ("--device", "card", "--vram", "12GB", "--ram", "64GB", "--quant", "none", "--seq", "512")
    options += ("--tokens-per-step", "512", "--set", "train.stream=host", "--set", "train.checkpointing=recompute")
    chosen = json.loads(cli("plan", model, *options, "--json").out)["chosen"]
    count = chosen["setting"]["resident"]
    assert 16 <= count < 32 and 11e9 < chosen["wanted"] <= 12e9
    shown = cli("plan", model, *options).out
    assert f"host −{count}" in shown and "train.resident_blocks" in shown
    none = json.loads(cli("plan", model, *options, "--set", "train.resident_blocks=0", "--json").out)["chosen"]
    assert none["need"]["total"] < 5e9 and none["time"]["copies"] > 2 * chosen["time"]["copies"]


def test_cards(cli, model):
    cards = json.loads(cli("plan", model, "--gpus", "--ram", "64GB", "--json").out)
    assert [card["card"] for card in cards] == [card.name for card in CARDS]
    assert cards[-1]["setting"]["quant"] == "none" and cards[-1]["setting"]["stream"] == "off"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--vram", "1GB"], "nothing fits 1.00 GB: the least is"),
        (["--vram", "8 bananas"], "write a number and a unit"),
        (["--vram", "8"], "a unit goes with it"),
        (["--vram", "8GB", "--ram", "1GB"], "of host memory"),
        (["--vram", "8GB", "--set", "train.lr=1"], "a plan takes adapter's keys"),
        (["--vram", "8GB", "--set", "train.stream=moon"], "should be 'off', 'host' or 'disk'"),
        (["--vram", "8GB", "--set", "train.resident_blocks=4"], "train.stream is off"),
        (
            ["--vram", "8GB", "--set", "train.stream=host", "--set", "train.resident_blocks=33"],
            "33 is more than the model's 32 blocks",
        ),
        (["--vram", "8GB", "--device", "tpu"], "cuda or cpu"),
        (["--vram", "8GB", "--targets", "nothing_here"], "nothing_here"),
    ],
)
def test_mistakes(cli, model, arguments, words):
    done = cli("plan", model, *arguments)
    assert done.code == 2 and words in done.err and done.err.count("\n") <= 2


@pytest.mark.parametrize(
    "change", [{"model_type": "martian"}, {"auto_map": {"AutoConfig": "a.B"}, "model_type": "own"}]
)
def test_unknown_models(cli, model, change):
    (model / "config.json").write_text(json.dumps(EIGHT_B | change))
    done = cli("plan", model, "--vram", "8GB")
    assert done.code == 2 and done.err.startswith("error:")


def test_calibrate_is_kept(cli, model, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    rates = json.loads(cli("bench", "--calibrate", "--device", "cpu", "--json").out)
    assert all(rates[key] > 0 for key in ("products", "bandwidth", "copy", "disk", "call"))
    planned = json.loads(cli("plan", model, "--device", "cpu", "--vram", "900GB", "--json").out)
    assert planned["machine"]["rates"]["products"] == rates["products"]
    assert planned["chosen"]["setting"]["quant"] == "none" and not planned["budget"]["cuda"]

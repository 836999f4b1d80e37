"""veneer bench: the step is measured here, with PEFT beside it; a directory without weights gets random ones."""

import json

import pytest

from conftest import tiny_llama

pytest_plugins = ["commands"]


@pytest.fixture
def shape(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "shape")
    return tmp_path / "shape"


def test_a_shape_without_weights_is_measured_with_peft_beside_it(cli, shape, tmp_path):
    done = cli(
        "bench", shape, "--batch", "2", "--length", "16", "--rank", "2", "--steps", "1", "--device", "cpu",
        "--against", "peft", "--json", "--trace", tmp_path / "trace.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [side["name"] for side in found["results"]] == ["veneer", "peft"] and found["matmul_flops"] > 0
    ours, theirs = found["results"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)  # random tokens: both near log(vocabulary)
    assert 0 < ours["limit_share"] < 1 and ours["memory"]["adapter"] > 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_base_is_measured_and_mistakes_are_said(cli, model_dir, shape):
    options = ["--length", "16", "--rank", "2", "--steps", "1", "--set", "train.pack=off", "--device", "cpu"]
    done = cli("bench", model_dir, *options)
    assert done.code == 0 and "tokens/s" in done.out and "share of the limit" in done.out
    for arguments, word in (
        (["--against", "unsloth"], "peft"),
        (["--checkpointing", "everything"], "checkpointing"),
        (["--quant", "nf4"], "no weights"),
    ):
        done = cli("bench", shape, "--device", "cpu", *arguments)
        assert done.code == 2 and word in done.err and done.err.count("error") == 1

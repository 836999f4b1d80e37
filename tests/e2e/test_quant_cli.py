"""--quant and veneer merge on the command line."""

import json

import pytest
import yaml

from conftest import tiny_llama

pytest_plugins = ["commands"]
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.fixture
def run(cli, tmp_path, tokenizer, conversations):
    """A finished run on a base in NF4, and the folder it is in."""
    base = tmp_path / "base"
    tiny_llama(**SIZES).save_pretrained(base)
    tokenizer.save_pretrained(base)
    data = conversations(tmp_path / "train.jsonl")
    done = cli(
        "train", "--model", base, "--data", data, "--heldout", data, "--out", tmp_path / "run", "--quant", "nf4",
        "--rank", 4, "--max-steps", 2, "--batch-size", 4, "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    return tmp_path


def test_a_run_remembers_how_its_base_was_quantised(cli, run):
    assert yaml.safe_load((run / "run/config.yaml").read_text())["quant"] == "nf4"
    for more in ([], ["--quant", "none"], ["--quant", "int8-torchao"]):
        done = cli("eval", run / "run", "--limit", 2, "--max-new-tokens", 3, "--json", "--device", "cpu", *more)
        assert done.code == 0 and json.loads(done.out)["n"] == 2, done.err
    assert cli("generate", run / "run", "--prompt", "hi", "--max-new-tokens", 3, "--device", "cpu").code == 0
    done = cli("eval", run / "run", "--quant", "int3", "--device", "cpu")
    assert done.code == 2 and "nf4" in done.err and "Traceback" not in done.err


def test_merge_writes_a_model_and_the_error_of_each_route(cli, run):
    done = cli("merge", run / "base", run / "run", "--out", run / "merged", "--device", "cpu")
    assert done.code == 0 and "same top token 100.0%" in done.out, done
    done = cli("merge", run / "base", run / "run", "--out", run / "nf4", "--quant", "nf4", "--device", "cpu")
    assert done.code == 0 and "not taken" in done.out and "unmerged" in done.out, done
    for name in ("merged", "nf4"):
        assert (
            cli("generate", "--model", run / name, "--prompt", "hi", "--max-new-tokens", 3, "--device", "cpu").code == 0
        )
    done = cli("merge", run / "nf4", run / "run", "--out", run / "again", "--device", "cpu")
    assert done.code == 2 and "stored quantised" in done.err and not (run / "again").exists()

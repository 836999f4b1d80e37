"""veneer combine on files, through the command line."""

import json

import pytest
import torch
from formats.adapters import saved

import veneer

pytest_plugins = ["commands"]


@pytest.fixture
def two(tmp_path, model_dir):
    from transformers import AutoModelForCausalLM

    base = lambda: AutoModelForCausalLM.from_pretrained(model_dir).eval()  # noqa: E731
    options = [{"rank": 4, "alpha": 7}, {"rank": 2, "alpha": 3, "rslora": True, "target_modules": ["v_proj"]}]
    return [saved(tmp_path / str(i), base(), i, **own) for i, own in enumerate(options)]


def test_combine_says_what_it_made(cli, two, tmp_path):
    done = cli("combine", *two, "--weights", "-0.7,0.3", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "method         cat" in done.out and "rank 4 to 6" in done.out and "relative error" in done.out
    assert cli("info", tmp_path / "out").code == 0
    again = cli("combine", *two, "--out", tmp_path / "out")
    assert again.code == 2 and "not empty" in again.err


def test_every_option_reaches_the_method(cli, two, tmp_path):
    out = tmp_path / "out"
    done = cli(
        *("combine", *two, "--method", "della", "--density", "0.5", "--epsilon", "0.2", "--rank", "3", "--seed", "7"),
        *("--scale", "2", "--like", "mergekit", "--space", "core", "--dtype", "bfloat16", "--out", out),
    )
    assert done.code == 0, done.err
    record = json.loads((out / "veneer.json").read_text())["combined"]
    wanted = {"method": "della", "density": 0.5, "epsilon": 0.2, "rank": 3, "seed": 7, "scale": 2.0}
    wanted |= {"like": "mergekit", "space": "core", "gamma": None}
    assert wanted.items() <= record.items()
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--weights", "1,2,3"], "one number for each of the 2"),
        (["--weights", "heavy"], "0.7,0.3"),
        (["--method", "average"], "there is no method"),
        (["--density", "0.3"], "no effect with method cat"),
        (["--method", "linear"], "use cat or svd"),
        (["--dtype", "int8"], "--dtype"),
        (["--model", "x"], "--tune-on"),
        (["--scale", "nan"], "scale is what"),
        (["--weights", "1e39,1"], "beyond float32 at"),
        (["--weights", "1e9,1", "--dtype", "float16"], "beyond float16 at"),
    ],
)
def test_mistakes_are_one_line(cli, two, tmp_path, arguments, says):
    done = cli("combine", *two, *arguments, "--out", tmp_path / "out")
    assert done.code == 2 and says in " ".join(done.err.split()) and not (tmp_path / "out").exists()


def test_weights_tuned_on_examples(cli, two, tmp_path, model_dir, conversations):
    data, out = conversations(tmp_path / "data.jsonl", 4), tmp_path / "out"
    done = cli("combine", *two, "--tune-on", data, "--model", model_dir, "--tune-steps", 3, "--out", out)
    assert done.code == 0, done.err
    assert "tuned weights" in done.out and "→" in done.out
    found = json.loads((out / "veneer.json").read_text())["combined"]["weights"]
    assert found != [0.5, 0.5] and len(found) == 2
    model, _ = veneer.load_base(str(model_dir))
    veneer.load_adapter(model, out)
    again = cli("combine", *two, "--tune-on", data, "--model", model_dir, "--out", out)
    assert again.code == 2 and "not empty" in again.err and "tuned" not in again.out  # said before the search


def test_verify_compares_with_the_stack_and_fails_where_it_must(cli, two, tmp_path, model_dir, monkeypatch):
    out, options = tmp_path / "out", ("--weights", "0.7,-0.3", "--model", model_dir, "--verify")
    done = cli("combine", *two, *options, "--out", out)
    assert done.code == 0, done.err
    assert "same top token 100.0%" in done.out
    done = cli("combine", *two, *options, "--method", "iso-c", "--out", tmp_path / "flat")
    assert done.code == 0 and "logit error" in done.out  # not the sum, on purpose
    from veneer.formats import combine

    monkeypatch.setattr(combine, "layer_weights", lambda weights, names, count: dict.fromkeys(names, [0.7, 0.3]))
    done = cli("combine", *two, *options, "--out", tmp_path / "wrong")
    assert done.code == 2 and "is not the sum of its adapters" in done.err

"""veneer export and veneer import on the command line: files that come back, errors in one line."""

import pytest
import torch
from safetensors.torch import load_file

pytest_plugins = ["commands"]


def factors(path):
    return load_file(path / "adapter_model.safetensors")


def test_there_and_back(cli, trained, model_dir, tmp_path):
    own = factors(trained / "adapter")
    for to, out in (("gguf", "a.gguf"), ("mlx", "m")):
        done = cli("export", trained, "--to", to, "--out", tmp_path / out, "--device", "cpu")
        assert done.code == 0 and "same top token 100.0%" in done.out, done
        done = cli("import", tmp_path / out, "--from", to, "--base", model_dir, "--out", tmp_path / f"{to}-back")
        assert done.code == 0 and "moves logits by max" in done.out, done
        back = factors(tmp_path / f"{to}-back")
        assert back.keys() == own.keys() and all(torch.equal(back[key], own[key]) for key in own)
        assert cli("generate", tmp_path / f"{to}-back", "--prompt", "hi", "--max-new-tokens", 2).code == 0
    done = cli("export", trained, "--to", "peft", "--for", "vllm", "--out", tmp_path / "v")
    assert done.code == 0 and "--max-lora-rank 8" in done.out and factors(tmp_path / "v").keys() == own.keys()
    assert cli("export", trained, "--to", "peft", "--out", tmp_path / "copy").code == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir()} == {
        p.name: p.read_bytes() for p in (trained / "adapter").iterdir()
    }
    assert cli("info", tmp_path / "v").code == 0
    assert all(not p.name.startswith(".") for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--to", "onnx"], "none of peft, gguf, mlx"),
        (["--to", "gguf", "--for", "vllm"], "--to peft"),
        (["--to", "peft", "--merged"], "veneer merge"),
        (["--to", "gguf", "--merged"], "convert_hf_to_gguf.py"),
        (["--to", "gguf", "--merged", "--out-type", "q4"], "none of f32"),
        (["--to", "gguf", "--merged", "--converter", "nowhere"], "no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(cli, trained, tmp_path, arguments, words):
    done = cli("export", trained, *arguments, "--out", tmp_path / "out")
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done
    assert not list(tmp_path.iterdir())


def test_what_stands_in_the_way_stays(cli, trained, model_dir, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"mine")
    done = cli("export", trained, "--to", "gguf", "--no-verify", "--out", tmp_path / "a.gguf")
    assert done.code == 2 and "exists" in done.err and (tmp_path / "a.gguf").read_bytes() == b"mine"
    done = cli("import", tmp_path / "a.gguf", "--from", "gguf", "--base", model_dir, "--out", tmp_path / "b")
    assert done.code == 2 and "no GGUF" in done.err and not (tmp_path / "b").exists()

"""Every command, from its arguments to what it leaves on disk and on the terminal."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from veneer import __version__
from veneer.base.load import load_base
from veneer.cli.init import TASKS
from veneer.config import AdapterConfig, DataConfig, OptimConfig, TrainConfig

pytest_plugins = ["commands"]
COMMANDS = [[], ["train"], ["eval"], ["chat"], ["generate"], ["data"], ["data", "inspect"], ["init"], ["info"]]


@pytest.fixture
def flags(model_dir, chat_file, tmp_path):
    """Flags of a run that takes a moment."""
    return ["--model", model_dir, "--data", chat_file, "--out", tmp_path / "run", "--rank", 4, "--max-steps", 2]


@pytest.fixture
def run_copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def records(run, kind):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == kind]


def test_train_from_flags(cli, flags, tmp_path):
    done = cli("train", *flags, "--lr", "1e-3", "--alpha", 8, "--targets", "q_proj,v_proj", "--batch-size", 4)
    run = tmp_path / "run"
    assert done.code == 0, done.err
    assert str(run / "adapter") in done.out and "veneer eval" in done.out
    assert "12 examples" in done.err and "step 2/2" in done.err
    config = TrainConfig.load(run / "config.yaml")
    assert (config.adapter.rank, config.adapter.alpha, config.train.lr) == (4, 8, 1e-3)
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
    assert [r["step"] for r in records(run, "train")] == [1, 2]
    assert (run / "adapter" / "adapter_model.safetensors").exists() and (run / "report.html").exists()


def test_flags_win_over_the_file(cli, tmp_path, model_dir, chat_file):
    file = tmp_path / "a.yaml"
    values = {"model": str(model_dir), "data": str(chat_file), "out": str(tmp_path / "no"), "adapter": {"rank": 2}}
    file.write_text(yaml.safe_dump(values | {"train": {"lr": 0.5, "max_steps": 7}}))
    run = tmp_path / "yes"
    done = cli(
        "train", file, "--out", run, "--max-steps", 1, "--lr", "1e-4", "--set", "train.pack=off", "--set", "seed=3"
    )
    assert done.code == 0, done.err
    config = TrainConfig.load(run / "config.yaml")
    assert (config.adapter.rank, config.train.lr, config.train.max_steps) == (2, 1e-4, 1)
    assert (config.train.pack, config.seed) == ("off", 3)
    assert not (tmp_path / "no").exists()


def test_dry_run_prints_the_configuration_and_writes_nothing(cli, flags, tmp_path):
    done = cli("train", *flags, "--dry-run")
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["adapter"]["rank"] == 4
    assert TrainConfig.from_dict(yaml.safe_load(done.out)).train.max_steps == 2
    assert "nothing was trained" in done.err
    assert not (tmp_path / "run").exists()


def test_second_train_into_the_same_directory_is_refused(cli, run_copy, flags):
    flags[flags.index("--out") + 1] = run_copy
    before = (run_copy / "metrics.jsonl").read_bytes()
    for more in ([], ["--dry-run"]):
        done = cli("train", *flags, *more)
        assert done.code == 2
        assert "--resume" in done.err and "another --out" in done.err
    assert (run_copy / "metrics.jsonl").read_bytes() == before


def test_resume_of_a_finished_run_changes_nothing(cli, run_copy):
    before = (run_copy / "adapter" / "adapter_model.safetensors").read_bytes()
    done = cli("train", run_copy, "--resume")
    assert done.code == 0, done.err
    assert "resuming after step 2" in done.err
    assert (run_copy / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert len(records(run_copy, "train")) == 2


def test_resume_of_a_run_that_lost_its_last_checkpoint(cli, tmp_path, model_dir, chat_file):
    run = tmp_path / "run"
    given = ["--model", model_dir, "--data", chat_file, "--batch-size", 4, "--rank", 4, "--set", "train.save_every=1"]
    assert cli("train", *given, "--out", run).code == 0
    whole = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    done = cli("train", "--resume", *given, "--out", run)
    assert done.code == 0, done.err
    assert "resuming after step 2" in done.err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_resume_needs_a_run_and_the_old_settings(cli, run_copy, tmp_path):
    done = cli("train", run_copy)
    assert done.code == 2 and "--resume" in done.err
    done = cli("train", run_copy, "--resume", "--lr", "0.5")
    assert done.code == 2 and "train.lr" in done.err
    (tmp_path / "none").mkdir()
    assert cli("train", tmp_path / "none", "--resume").code == 2


def test_eval_of_a_run(cli, run_copy):
    done = cli("eval", run_copy, "--limit", 3, "--max-new-tokens", 8)
    assert done.code == 0, done.err
    result = json.loads((run_copy / "eval.json").read_text())
    assert result["n"] == 3
    assert set(result["base"]) == set(result["adapter"])
    assert result["adapter"]["cut_off"] <= 3
    assert "exact match" in done.out and "valid JSON" in done.out
    page = (run_copy / "report.html").read_text()
    assert "xact match" in page and "alid JSON" in page
    info = json.loads(cli("info", run_copy, "--json").out)
    assert info["scores"]


def test_eval_of_an_adapter_alone(cli, trained, conversations, tmp_path):
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    data = conversations(tmp_path / "d.jsonl", 2)
    done = cli("eval", adapter, "--data", data, "--max-new-tokens", 4, "--no-base", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert "base" not in result and result["n"] == 2
    assert not (tmp_path / "eval.json").exists()
    done = cli("eval", adapter)
    assert done.code == 2 and "--data" in done.err


def test_generate_one_prompt(cli, trained, model_dir):
    adapted = cli("generate", trained, "--prompt", "hello", "--max-new-tokens", 6)
    assert adapted.code == 0, adapted.err
    again = cli("generate", trained / "adapter", "--prompt", "hello", "--max-new-tokens", 6)
    assert again.out == adapted.out
    bare = cli("generate", "--model", model_dir, "--prompt", "hello", "--max-new-tokens", 6, "--raw")
    assert bare.code == 0 and "cut off" in bare.err
    sampled = [
        cli("generate", trained, "-p", "a", "--max-new-tokens", 6, "--temperature", 1, "--seed", s).out
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_files(cli, trained, tmp_path):
    file, out = tmp_path / "p.jsonl", tmp_path / "new" / "out.jsonl"
    asked = [{"prompt": "one"}, "two", {"messages": [{"role": "user", "content": "thrée"}]}]
    file.write_text("\n".join(json.dumps(a) for a in asked) + "\n\n")
    done = cli("generate", trained, "--prompts", file, "--out", out, "--max-new-tokens", 5, "--batch-size", 2)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [r["prompt"] for r in rows] == ["one", "two", asked[2]["messages"]]
    assert all(r["tokens"] <= 5 and r["finish_reason"] in ("stop", "length") for r in rows)

    lines = tmp_path / "p.txt"
    lines.write_text("one\n\ntwo\n")
    done = cli("generate", trained, "--prompts", lines, "--max-new-tokens", 5)
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [a["text"] for a in answers] == [r["text"] for r in rows[:2]]


def test_chat(cli, trained, monkeypatch):
    lines = ["hello", "/compare", "how are you?", "/reset", "/system Be brief.", "/what", "hello", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    done = cli("chat", trained, "--max-new-tokens", 4)
    assert done.code == 0, done.err
    assert done.out.count("base> ") == done.out.count("adapter> ") == 2
    assert "comparing with the base" in done.err
    assert done.err.count("commands:") == 2


def test_chat_goes_on_when_the_context_is_full(cli, model_dir, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("7 " * 300 + "\n/reset\nhello\n"))
    done = cli("chat", "--model", model_dir, "--max-new-tokens", 4)
    assert done.code == 0
    assert done.err.count("error:") == 1 and "context of 256" in done.err
    assert done.out.endswith("\n")


def test_inspect(cli, chat_file, model_dir, tmp_path):
    chat_file.write_text(chat_file.read_text() * 2)
    done = cli("data", "inspect", chat_file, "--model", model_dir, "--show", 1, "--heldout", chat_file)
    assert done.code == 0, done.err
    assert "messages" in done.err and "24" in done.out and "duplicate" in done.out.lower()
    file = tmp_path / "a.yaml"
    file.write_text(f"model: {model_dir}\ndata: {chat_file}\nout: x\n")
    assert cli("data", "inspect", file).code == 0


@pytest.mark.parametrize("task", TASKS)
def test_init(cli, task, tmp_path):
    file = tmp_path / "v.yaml"
    assert cli("init", task, "--out", file).code == 0
    config = TrainConfig.load(file)
    assert config.out == f"runs/{task}"
    keys = "|".join(
        key for section in (TrainConfig, DataConfig, AdapterConfig, OptimConfig) for key in section.model_fields
    )
    text, count = re.subn(rf"^( *)# ((?:{keys}): ?)", r"\1\2", file.read_text(), flags=re.MULTILINE)
    file.write_text(text)
    assert count > 30
    assert TrainConfig.load(file) == config
    done = cli("init", task, "--out", file)
    assert done.code == 2 and "--force" in done.err
    assert cli("init", task, "--out", file, "--force").code == 0
    assert cli("init", "nothing", "--out", tmp_path / "n.yaml").code == 2


def test_info(cli, trained):
    for path in (trained, trained / "adapter"):
        done = cli("info", path)
        assert done.code == 0 and "rank" in done.out and "q_proj × 2" in done.out
        values = json.loads(cli("info", path, "--json").out)
        assert values["ranks"] == [4] and values["modules"] == 14
    assert json.loads(cli("info", trained, "--json").out)["steps"] == 2
    assert cli("info", trained / "nowhere").code == 2


def test_version(cli):
    assert cli("--version").out == f"veneer {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "veneer", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"veneer {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(cli, command):
    done = cli(*command, "--help")
    assert done.code == 0 and "Usage" in done.out


def test_early_stop(cli, flags, conversations, tmp_path):
    held = conversations(tmp_path / "held.jsonl", 4, 30)
    settings = ["train.eval_every=1", "train.early_stop=2", "train.lr=3.0", "train.schedule=constant"]
    flags[-1] = 40
    given = [part for setting in settings for part in ("--set", setting)]
    done = cli("train", *flags, "--heldout", held, "--epochs", 40, "--device", "cpu", *given)
    assert done.code == 0, done.err
    evaluations = records(tmp_path / "run", "eval")
    assert len(evaluations) < 40 and [e["best"] for e in evaluations[-2:]] == [False, False]
    assert (tmp_path / "run" / "best" / "adapter_config.json").exists()
    assert "held-out best" in done.out


def test_heldout_fraction(cli, flags, tmp_path):
    done = cli("train", *flags, "--set", "data.heldout_fraction=0.25")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())["data"]
    assert (record["train"]["examples_used"], record["heldout"]["examples_used"]) == (9, 3)
    scored = cli("eval", tmp_path / "run", "--max-new-tokens", 4)
    assert scored.code == 0, scored.err
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["n"] == 3
    assert records(tmp_path / "run", "eval")


def test_merge_brings_new_tokens_along_and_refuses_biases_without_a_place(cli, model_dir, chat_file, tmp_path):
    flags = [
        "--model",
        model_dir,
        "--data",
        chat_file,
        "--rank",
        2,
        "--max-steps",
        2,
        "--batch-size",
        4,
        "--lr",
        "2e-2",
    ]
    assert cli("train", *flags, "--out", tmp_path / "new", "--new-tokens", "<tool>").code == 0
    done = cli("merge", model_dir, tmp_path / "new", "--out", tmp_path / "merged")
    assert done.code == 0 and "same top token 100.0%" in done.out, done.err
    model, tokenizer = load_base(tmp_path / "merged")
    assert tokenizer.tokenize("a <tool>")[-1] == "<tool>"
    assert model.get_input_embeddings().weight.shape[0] == max(420, len(tokenizer))
    assert cli("train", *flags, "--out", tmp_path / "bias", "--lora-bias").code == 0
    done = cli("merge", model_dir, tmp_path / "bias", "--out", tmp_path / "biased")
    assert done.code == 2 and "would lose them" in done.err
    assert not (tmp_path / "biased").exists()


def test_resize_writes_a_smaller_adapter_and_shows_the_error(cli, trained, tmp_path):
    done = cli("resize", trained, "--rank", 2, "--out", tmp_path / "small")
    assert done.code == 0 and "of all updates" in done.out and "worst" in done.out, done.err
    assert json.loads(cli("info", tmp_path / "small", "--json").out)["ranks"] == [2]
    assert cli("generate", tmp_path / "small", "--prompt", "hi", "--max-new-tokens", 2).code == 0
    done = cli("resize", trained, "--rank", 2, "--out", tmp_path / "small")
    assert done.code == 2 and done.err.count("error:") == 1 and "exists" in done.err

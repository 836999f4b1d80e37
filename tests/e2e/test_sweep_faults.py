"""veneer sweep when something is wrong: settings, data, one of its runs, or how it is resumed."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import yaml
from commands import assert_as_alone

import veneer
from veneer.cli.sweep import SweepDisplay
from veneer.training.setup import open_base
from veneer.training.sweep import Sweep, SweepOptions
from veneer.training.trials import Trial, named_trials

pytest_plugins = ["commands"]


@pytest.mark.parametrize("search", ["grid", "halving"])
def test_one_whose_heldout_loss_is_nan_diverged_and_is_never_the_best(cli, yaml_file, tmp_path, search):
    """The last update spoils the adapter, which no training loss shows any more."""
    file = yaml_file(max_grad_norm=0, warmup=0, schedule="constant", epochs=1, eval_every=100)
    steps = {"grid": 1, "halving": 3}[search]  # halving: one step to the first rung
    rates = "1e30,1e29,1e28,1e27,1e-7,1e-6,1e-5,1e-2"
    done = cli("sweep", file, "--set", f"train.lr={rates}", "--set", f"train.max_steps={steps}", "--search", search)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [t["status"] for t in record["trials"][:4]] == ["diverged"] * 4
    assert all("held-out loss became nan" in t["reason"] for t in record["trials"][:4])
    assert record["best"] == "8-lr=0.01"
    ended = [t["name"] for t in record["trials"] if t["status"] == "finished"]
    assert len(ended) == {"grid": 4, "halving": 1}[search], ended


def test_a_training_loss_is_no_match_for_a_heldout_one(cli, yaml_file, tmp_path):
    file = yaml_file()
    done = cli("sweep", file, "--set", f"data.heldout={yaml.safe_load(file.read_text())['data']['heldout']},null")
    assert done.code == 0, done.err
    trials = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]
    assert trials[1]["loss"] < trials[0]["heldout"] and trials[1]["heldout"] is None
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["best"] == trials[0]["name"]
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert page.index(f">{trials[0]['name']}</a>") < page.index(f">{trials[1]['name']}</a>")


@pytest.mark.parametrize("group", [{}, {"dtype": "bfloat16"}])
def test_missing_data_of_one_is_found_before_any_trains(cli, yaml_file, tmp_path, group):
    bad = {"name": "bad", "data": str(tmp_path / "none.jsonl")} | group
    for extra in (["--dry-run"], []):
        done = cli("train", yaml_file({"adapters": [{"name": "good"}, bad]}), *extra)
        assert done.code == 2 and done.err.count("error:") == 1 and "bad: " in done.err and "none.jsonl" in done.err
        assert not (tmp_path / "sweep" / "good").exists()
    (tmp_path / "none.jsonl").write_text('{"messages": [{"role": "user", "content": "no answer"}]}\n')
    done = cli("train", yaml_file({"adapters": [{"name": "good"}, bad]}))
    assert done.code == 2 and "bad: " in done.err and "no assistant turn" in done.err
    assert cli("train", yaml_file({"adapters": [{"name": "good"}]}, max_steps=1)).code == 0  # mended, it can start


def test_an_edited_list_is_not_resumed_as_if_nothing_had_changed(cli, yaml_file, tmp_path):
    listed = {"adapters": [{"name": "a"}, {"name": "b", "seed": 1}]}
    assert cli("train", yaml_file(listed, max_steps=1)).code == 0
    done = cli("train", yaml_file({"adapters": [{"name": "a"}, {"name": "b", "seed": 2}]}, max_steps=1), "--resume")
    assert done.code == 2 and "seed (1 → 2)" in done.err
    done = cli("train", yaml_file({"adapters": [{"name": "a"}]}, max_steps=1), "--resume")
    assert done.code == 2 and "other adapters" in done.err
    assert "train.lr" in cli("train", yaml_file(listed, max_steps=1), "--resume", "--lr", 1e-4).err
    assert cli("train", yaml_file(listed, max_steps=1, save_every=3), "--resume").code == 0  # changes no result
    for flag in (["--lr", 1e-4], ["--dry-run"]):
        done = cli("train", tmp_path / "sweep", "--resume", *flag)
        assert done.code == 2 and "as it was started" in done.err


def test_a_resumed_sweep_may_train_fewer_at_once(cli, yaml_file, tmp_path):
    assert cli("sweep", yaml_file(max_steps=1), "--set", "seed=1,2").code == 0
    assert cli("sweep", tmp_path / "sweep", "--resume", "--at-once", 1, "--tokens", 64).code == 0
    options = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["options"]
    assert (options["at_once"], options["tokens"]) == (1, 64)


def test_a_streamed_base_trains_its_adapters_one_by_one(cli, yaml_file, tmp_path):
    done = cli("sweep", yaml_file(max_steps=2), "--set", 'train.stream="off",host')
    assert done.code == 0, done.err
    trials = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]
    assert [t["alone"] for t in trials] == ["", "its base is streamed"]
    assert trials[0]["heldout"] == pytest.approx(trials[1]["heldout"], rel=1e-4)
    assert_as_alone(cli, tmp_path / "sweep" / trials[1]["name"], tmp_path)


def test_a_list_whose_base_is_not_streamed_any_more_trains_together(yaml_file):
    was, now = (yaml.safe_load(yaml_file(stream=stream).read_text()) for stream in ("host", "off"))
    over = Trial("over", {}, "finished", alone="its base is streamed")
    going_on = Sweep(was["out"], was, [over, Trial("left", {}, alone="its base is streamed")])
    going_on.adopt(now, [Trial("over", {}), Trial("left", {})])
    assert [trial.alone for trial in going_on.trials] == ["its base is streamed", ""]


def test_what_a_kill_left_of_sweep_json_is_cleared_away(cli, yaml_file, tmp_path):
    left = tmp_path / "sweep" / ".sweep.json.0123.tmp"
    left.parent.mkdir()
    for extra in (["sweep", yaml_file(max_steps=1), "--set", "seed=1,2"], ["sweep", left.parent, "--resume"]):
        left.write_text("{")
        done = cli(*extra)
        assert done.code == 0 and not left.exists(), done.err


def test_progress_counts_those_that_train(yaml_file):
    values = yaml.safe_load(yaml_file(max_grad_norm=0, warmup=0, schedule="constant", epochs=4).read_text())
    settings, display, most = [{"train.lr": lr} for lr in (1e-4, 1e30, 1e-2, 1e29, 1e-3)], SweepDisplay(), []

    def observe(record):
        display(record)
        most.append(len(display.running))

    with display:
        sweep = Sweep(values["out"], values, named_trials(settings), SweepOptions("halving", 2), observe=observe).run()
    assert max(most) == 2 and not display.running
    assert all(display.totals[t.name] == t.step for t in sweep.trials if t.status != "stopped")


def test_no_two_bases_are_in_memory(yaml_file, monkeypatch):
    opened = []

    def remembered(*given):
        assert not any(model() for model in opened)
        model, tokenizer = open_base(*given)
        opened.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr("veneer.training.sweep.open_base", remembered)
    groups = {
        "adapters": [{"name": "a"}, {"name": "b", "dtype": "bfloat16"}, {"name": "c", "train": {"stream": "host"}}]
    }
    gc.disable()
    try:
        done = veneer.train_many(yaml_file(groups, max_steps=1))
    finally:
        gc.enable()
    gc.collect()
    assert len(done.trials) == 3 and len(opened) == 6 and not any(model() for model in opened)


def test_fewer_combinations_than_asked_for_are_told(cli, yaml_file):
    done = cli("sweep", yaml_file(), "--set", "seed=1,2", "--search", "random", "--trials", 9, "--dry-run")
    assert done.code == 0 and "no more than 2 combinations" in done.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "adapter.rank"], "KEY=VALUE"),
        (["--set", "adapter.rnak=1,2"], "did you mean 'rank'"),
        (["--set", "adapter.rank=2,2"], "given twice"),
        (["--set", "adapter.rank=2,4", "--set", "adapter.rank=8"], "given twice"),
        (["--set", "train.lr=1e-3..1e-2"], "--search random"),
        (["--set", "train.lr=1e-2..1e-3", "--search", "random"], "the smaller"),
        (["--set", "seed=1"], "nothing to vary"),
        (["--set", "seed=1,2", "--search", "bayes"], "grid, random, halving"),
        (["--set", "seed=1,2", "--trials", "2"], "--search random"),
        (["--set", "adapter.rank=4,4000"], "rank 4000 is above"),
        (["--set", "adapter.target_modules=mlp,nothing"], "2-target_modules=nothing"),
        (["--resume"], "holds no sweep"),
        (["--resume", "--set", "seed=1,2"], "--resume goes on"),
        (["--resume", "--dry-run"], "--resume goes on"),
        (["--resume", "--seed", "1"], "--resume goes on"),
        (["--set", "out=x,y"], "1-out=x: out is the same for all"),
        (["--set", "seed=1,2", "--set", "train.vram=8GB"], "train.vram plans a single run"),
        (["--set", "seed=1,2", "--set", "model=nowhere", "--dry-run"], "nowhere"),
        (["--set", "model=nowhere,elsewhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(cli, yaml_file, tmp_path, arguments, message):
    done = cli("sweep", yaml_file(), *arguments)
    assert done.code == 2 and done.err.count("error:") == 1 and message in done.err.replace("\n", " "), done.err
    assert not list(tmp_path.glob("sweep/*/metrics.jsonl"))


def test_halving_needs_heldout_data(cli, yaml_file):
    file = yaml_file()
    values = yaml.safe_load(file.read_text())
    del values["data"]["heldout"]
    file.write_text(yaml.safe_dump(values))
    done = cli("sweep", file, "--set", "seed=1,2", "--search", "halving")
    assert done.code == 2 and "heldout_fraction" in done.err


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"model": "x"}, "all adapters share"),
        ({"name": "a/b"}, "becomes a folder"),
        ({"name": "sweep.json"}, "a file's of the sweep itself"),
        ({"name": "report.html"}, "a file's of the sweep itself"),
        ({"adapter": {"rnak": 1}}, "rank"),
    ],
)
def test_a_wrong_entry_of_the_list_is_named(cli, yaml_file, entry, message):
    done = cli("train", yaml_file({"adapters": [{"name": "good"}, entry]}))
    assert done.code == 2 and done.err.count("error:") == 1 and message in done.err

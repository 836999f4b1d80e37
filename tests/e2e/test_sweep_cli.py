"""veneer sweep and veneer train of a list, the way a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from commands import assert_as_alone, weights, write_conversations

from veneer.config import TrainConfig
from veneer.training.metrics import read_metrics
from veneer.training.sweep import Sweep, SweepOptions
from veneer.training.trials import named_trials

pytest_plugins = ["commands"]


def test_a_grid_trains_together_ends_as_alone_and_has_a_page(cli, yaml_file, tmp_path):
    done = cli("sweep", yaml_file(), "--set", "adapter.rank=2,8", "--set", "train.lr=1e-3,2e-2", "--set", "seed=3")
    assert done.code == 0, done.err
    out = tmp_path / "sweep"
    record = json.loads((out / "sweep.json").read_text())
    names = [trial["name"] for trial in record["trials"]]
    assert names == ["1-rank=2-lr=0.001", "2-rank=2-lr=0.02", "3-rank=8-lr=0.001", "4-rank=8-lr=0.02"]
    assert all(t["status"] == "finished" and t["step"] == 6 and t["heldout"] for t in record["trials"])
    assert record["best"] == min(record["trials"], key=lambda t: t["heldout"])["name"]
    for name in names:
        assert name in done.out
    assert record["best"] in done.out.split("best")[-1] and "veneer chat" in done.out
    assert TrainConfig.load(out / names[3] / "config.yaml").seed == 3
    for name in names[:2]:
        assert_as_alone(cli, out / name, tmp_path)
    page = (out / "report.html").read_text()
    assert all(name in page for name in names) and page.count("<svg") == 4 and "Best settings" in page
    scored = cli("eval", out / names[0], "--max-new-tokens", 3)
    assert scored.code == 0, scored.err
    assert (out / names[0] / "report.html").exists()
    assert cli("info", out / names[1]).code == 0
    assert cli("generate", out / names[2], "--prompt", "hi", "--max-new-tokens", 2).code == 0
    assert cli("sweep", yaml_file(), "--set", "adapter.rank=2,8").code == 2


def test_more_trials_than_fit_wait_their_turn(cli, yaml_file, tmp_path):
    done = cli("sweep", yaml_file(), "--set", "seed=0,1,2,3,4", "--at-once", 2, "--set", "train.max_steps=3")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [t["step"] for t in record["trials"]] == [3] * 5
    assert_as_alone(cli, tmp_path / "sweep" / "5-seed=4", tmp_path)


def test_halving_stops_the_worse_half_at_each_rung(cli, yaml_file, tmp_path):
    file = yaml_file(epochs=4, eval_every=100)
    done = cli("sweep", file, "--set", "train.lr=1e-6,1e-5,1e-2,2e-2", "--search", "halving", "--at-once", 3)
    assert done.code == 0, done.err
    trials = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]
    assert [(t["status"], t["step"]) for t in trials[:2]] == [("stopped", 3), ("stopped", 3)]
    assert sorted((t["status"], t["step"]) for t in trials[2:]) == [("finished", 12), ("stopped", 6)]
    assert "2 of 4 go on" in done.err and "1 of 2 go on" in done.err
    winner = next(t for t in trials if t["status"] == "finished")
    assert len(winner["rungs"]) == 2 and winner["rungs"][1] < winner["rungs"][0]
    assert_as_alone(cli, tmp_path / "sweep" / winner["name"], tmp_path)
    stopped = tmp_path / "sweep" / trials[0]["name"]
    assert (stopped / "adapter" / "adapter_config.json").exists() and cli("info", stopped).code == 0


def test_random_draws(cli, yaml_file):
    given = ["sweep", yaml_file(), "--set", "train.lr=1e-5..1e-2", "--set", "adapter.rank=2,4", "--search", "random"]
    done = cli(*given, "--trials", 6, "--dry-run")
    names = done.out.split()
    assert done.code == 0 and len(set(names)) == 6
    assert cli(*given, "--trials", 6, "--dry-run").out.split() == names
    assert cli(*given, "--trials", 6, "--seed", 1, "--dry-run").out.split() != names
    assert "--trials" in cli(*given, "--dry-run").err


LISTED = {
    "adapters": [
        {"name": "small", "adapter": {"rank": 2, "target_modules": ["q_proj"]}, "train": {"lr": 1e-2}},
        {"name": "other", "seed": 7, "train": {"epochs": 1, "batch_size": 3}},
        {"adapter": {"modules_to_save": ["norm"]}, "train": {"max_steps": 2}},
    ]
}


def test_train_of_a_list_with_data_of_their_own_and_one_that_trains_by_itself(cli, yaml_file, tmp_path):
    entry = {"name": "tenant", "data": str(write_conversations(tmp_path / "t.jsonl", 5, 200))}
    done = cli("train", yaml_file({"adapters": [*LISTED["adapters"], entry]}))
    assert done.code == 0, done.err
    out = tmp_path / "sweep"
    trials = {t["name"]: t for t in json.loads((out / "sweep.json").read_text())["trials"]}
    assert {name: t["step"] for name, t in trials.items()} == {"small": 6, "other": 4, "adapter-3": 2, "tenant": 4}
    assert "adapter-3 trains by itself: it trains whole modules" in done.err and trials["adapter-3"]["alone"]
    for name in trials:
        assert_as_alone(cli, out / name, tmp_path)


def test_one_that_diverges_leaves_and_the_others_go_on(cli, yaml_file, tmp_path):
    file = yaml_file(max_grad_norm=0, warmup=0, schedule="constant")
    done = cli("sweep", file, "--set", "train.lr=5e-3,1e30")
    assert done.code == 0, done.err
    trials = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]
    assert [t["status"] for t in trials] == ["finished", "diverged"]
    assert "diverged and left" in done.err and "bad_batch.json" in trials[1]["reason"]
    assert not (tmp_path / "sweep" / trials[1]["name"] / "adapter").exists()
    assert_as_alone(cli, tmp_path / "sweep" / trials[0]["name"], tmp_path)
    assert "⚠ diverged" in (tmp_path / "sweep" / "report.html").read_text()
    assert cli("sweep", file, "--set", "train.lr=1e29,1e30", "--out", tmp_path / "all").code == 2


CHILD = """
import sys, torch
torch.set_num_threads(1)
from veneer.training.sweep import Sweep, SweepOptions
from veneer.training.trials import named_trials
from veneer.config import read_yaml
def observe(r):
    print(r["type"], r.get("step"), flush=True)
values = read_yaml(sys.argv[1])
settings = [{"train.lr": 1e-3, "seed": 1}, {"train.lr": 5e-3}, {"adapter.rank": 2, "train.epochs": 6}]
sweep = Sweep(values["out"], values, named_trials(settings), SweepOptions(at_once=2), observe=observe)
sweep.run()
"""


def test_killed_and_resumed_all_end_as_alone(cli, yaml_file, tmp_path):
    file, out = yaml_file(epochs=4, save_every=2), tmp_path / "sweep"
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    steps = 0
    for line in process.stdout:
        steps += line.startswith("train")
        if steps == 11:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not list(out.glob("*/adapter"))
    done = cli("sweep", out, "--resume")
    assert done.code == 0, done.err
    trials = json.loads((out / "sweep.json").read_text())["trials"]
    assert [(t["status"], t["step"]) for t in trials] == [("finished", 12), ("finished", 12), ("finished", 18)]
    for trial in trials:
        steps = [r["step"] for r in read_metrics(out / trial["name"]) if r["type"] == "train"]
        assert steps == list(range(1, trial["total_steps"] + 1))
        assert_as_alone(cli, out / trial["name"], tmp_path)
    before = weights(out / trials[0]["name"])
    assert cli("train", out, "--resume").code == 0
    assert all(torch.equal(value, before[key]) for key, value in weights(out / trials[0]["name"]).items())


def test_interrupted_halving_goes_on_to_the_same_end(cli, yaml_file, tmp_path):
    values = yaml.safe_load(yaml_file(epochs=4, eval_every=100).read_text())
    settings = [{"train.lr": lr} for lr in (1e-6, 1e-5, 1e-2, 2e-2)]

    def start(out, stop_at=None):
        seen = []

        def observe(record):
            seen.extend([1] if record["type"] == "train" else [])
            if len(seen) == stop_at:
                sweep.interrupt.count = 1

        sweep = Sweep(
            out, values | {"out": str(out)}, named_trials(settings), SweepOptions("halving", 3), observe=observe
        )
        return sweep.run()

    assert not start(tmp_path / "plain").interrupted
    for stop_at in (5, 15):  # before the first rung, and between the two
        out = tmp_path / f"stopped-{stop_at}"
        assert start(out, stop_at).interrupted
        done = cli("sweep", out, "--resume")
        assert done.code == 0, done.err
        plain, mine = (json.loads((o / "sweep.json").read_text())["trials"] for o in (tmp_path / "plain", out))
        for one, other in zip(plain, mine):
            assert (one["status"], one["step"], one["reason"]) == (other["status"], other["step"], other["reason"])
            assert one["rungs"] == pytest.approx(other["rungs"], rel=1e-4)


def test_on_a_quantised_base(cli, yaml_file, tmp_path):
    pytest.importorskip("bitsandbytes")
    done = cli("sweep", yaml_file({"quant": "nf4"}), "--set", "adapter.rank=2,5")
    assert done.code == 0, done.err
    assert_as_alone(cli, tmp_path / "sweep" / "2-rank=5", tmp_path)


def test_a_run_that_was_killed_after_its_last_step_takes_no_other(cli, yaml_file, tmp_path):
    out = tmp_path / "sweep"
    assert cli("sweep", yaml_file(), "--set", "seed=1,2").code == 0
    before = {run: weights(out / run) for run in ("1-seed=1", "2-seed=2")}
    record = json.loads((out / "sweep.json").read_text())
    for trial in record["trials"]:
        trial["status"] = "waiting"
        shutil.rmtree(out / trial["name"] / "adapter")
    (out / "sweep.json").write_text(json.dumps(record))
    assert cli("sweep", out, "--resume").code == 0
    for run, old in before.items():
        assert [r["step"] for r in read_metrics(out / run) if r["type"] == "train"] == list(range(1, 7))
        assert all(torch.equal(value, old[key]) for key, value in weights(out / run).items())

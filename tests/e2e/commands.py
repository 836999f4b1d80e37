"""Run the command line in this process, and a small trained run to use it on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from veneer.cli.main import main
from veneer.training.metrics import read_metrics


@dataclass
class Done:
    """What a command left: exit code and output."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """`cli("train", path, …)` runs a command and returns its exit code and output."""

    def run(*arguments) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return Done(ended.value.code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def conversations():
    """`conversations(path, count, start)` writes a file of short conversations whose answers are JSON."""
    return write_conversations


def write_conversations(path: Path, count: int = 12, start: int = 0) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"I am number {i} in city {i * 7}."},
                {"role": "assistant", "content": json.dumps({"name": i, "city": i * 7})},
            ]
        }
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir, conversations):
    """A finished run of two steps, with held-out data. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    train, held = conversations(folder / "train.jsonl"), conversations(folder / "held.jsonl", 6, 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VENEER_CACHE", str(folder / "cache"))
        with pytest.raises(SystemExit) as ended:
            main(
                ["train", "--model", str(model_dir), "--data", str(train), "--heldout", str(held)]
                + ["--out", str(folder / "run"), "--rank", "4", "--max-steps", "2", "--batch-size", "4"]
            )
    assert ended.value.code == 0
    return folder / "run"


@pytest.fixture
def yaml_file(tmp_path, model_dir):
    """`yaml_file(**train)` writes a configuration of a run of six steps with held-out data."""
    train, held = write_conversations(tmp_path / "d.jsonl"), write_conversations(tmp_path / "h.jsonl", 6, 50)

    def write(extra: dict | None = None, **options):
        values = {
            "model": str(model_dir),
            "data": {"train": str(train), "heldout": str(held)},
            "out": str(tmp_path / "sweep"),
            "device": "cpu",
            "adapter": {"rank": 4},
            "train": {"batch_size": 4, "epochs": 2, "lr": 5e-3, "micro_batch_tokens": 512} | options,
        }
        path = tmp_path / "veneer.yaml"
        path.write_text(yaml.safe_dump(values | (extra or {})))
        return path

    return write


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_as_alone(cli, run, tmp_path, tolerance=2e-3):
    """The run's adapter is what `veneer train` of its own configuration gives."""
    done = cli("train", run / "config.yaml", "--out", tmp_path / f"alone-{run.name}")
    assert done.code == 0, done.err
    mine, other = weights(run), weights(tmp_path / f"alone-{run.name}")
    assert mine.keys() == other.keys()
    for key, value in other.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=tolerance * float(value.abs().max()), msg=key)
    for kind, key in (("train", "loss"), ("train", "lr"), ("eval", "loss")):
        mine, other = (
            [r[key] for r in read_metrics(x) if r["type"] == kind] for x in (run, tmp_path / f"alone-{run.name}")
        )
        assert mine == pytest.approx(other, rel=1e-4), kind

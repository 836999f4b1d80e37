"""Run the command line in this process, and a small trained run to use it on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from veneer.cli.main import main


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

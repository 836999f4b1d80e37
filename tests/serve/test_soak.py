"""The soak of benchmarks/, for a few seconds on a tiny model: what must hold in 20 minutes holds here."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak_serve.py"


def test_a_short_soak(model_dir, tmp_path, monkeypatch):
    """Its clients run in this process, the server in one of its own."""
    words = f"--adapters 4 --every 1 --minutes 0.05 --base {model_dir} --threads 1 --out {tmp_path / 'out.json'}"
    monkeypatch.setattr(sys, "argv", [str(SOAK), *words.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SOAK), run_name="__main__")
    found = json.loads((tmp_path / "out.json").read_text())
    holds = {what: held for what, held in found["holds"].items() if "memory" not in what}  # too short for that
    assert all(holds.values()) and len(holds) == 4, (found["lost"], found["wrong"])
    assert {"whole", "stream", "left", "bad", "changing", "loads"} <= found["counts"].keys()

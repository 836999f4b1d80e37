"""The soak of benchmarks/, for a few seconds on a tiny model: what must hold in 20 minutes holds here."""

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak_serve.py"


def test_a_short_soak(model_dir, tmp_path):
    command = [
        sys.executable,
        SOAK,
        "--adapters",
        "4",
        "--every",
        "1",
        "--minutes",
        "0.05",
        "--base",
        model_dir,
        "--threads",
        "1",
    ]
    done = subprocess.run([*command, "--out", tmp_path / "out.json"], capture_output=True, text=True, timeout=600)
    found = json.loads((tmp_path / "out.json").read_text())
    holds = {what: held for what, held in found["holds"].items() if "memory" not in what}  # too short for that
    assert all(holds.values()) and len(holds) == 4, (found["lost"], found["wrong"], done.stderr[-2000:])
    assert {"whole", "stream", "left", "bad", "changing", "loads"} <= found["counts"].keys()

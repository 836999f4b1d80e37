"""What benchmarks/bench_plan.py keeps of an earlier measurement, and scripts/memory_table.py says of it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from veneer.plan.constants import MARGIN

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def modules():
    """`bench_plan` and `memory_table`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield import_module("bench_plan"), import_module("memory_table")
    for name in ("bench_plan", "memory_table", "plan_cases", "plan_measure"):
        sys.modules.pop(name, None)


def result(stream="off", held=True, reserved=100.0, predicted=100.0, **measured):
    return {
        "case": {"stream": stream},
        "measured": {"reserved": reserved} | measured,
        "need": {"reserved": predicted},
        "held": held,
        "notes": [],
    }


def test_what_is_measured_again(modules):
    bench, _ = modules
    assert bench.sound(result()) and bench.sound(result(base=5)) and bench.sound(result("host"))
    assert not bench.sound(result("host", base=5))  # its peak has the making of the whole base
    assert not bench.sound(result(held=bench.AGAIN))
    assert not bench.sound({"case": {"stream": "off"}, "skipped": "--limit-seconds"})


def test_a_file_is_written_whole(modules, tmp_path):
    bench, _ = modules
    for text in ("one", "two"):
        bench.write_text(tmp_path / "out.json", text)
        assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("out.json", text)]


def test_another_prediction_counts_as_held_where_that_follows(modules):
    bench, table = modules
    low = 99.0 / (1 + MARGIN)
    assert table.still_held(result(), 98.0) is True  # 98 and the margin are more than it took by itself
    assert table.still_held(result(predicted=low), low + 0.5) is True
    assert table.still_held(result(), low) == bench.AGAIN
    assert table.still_held(result(held="out of memory", predicted=low), low - 1) == "out of memory"
    assert table.still_held(result(held="out of memory", predicted=low - 1), low) == bench.AGAIN
    assert table.still_held(result(held="out of memory", predicted=low), 98.0) is True

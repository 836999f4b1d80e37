"""A sweep's page from whatever the sweep holds."""

from __future__ import annotations

import json
import re
import warnings

import pytest
from test_page import Page

from veneer.errors import RunError
from veneer.report.sweep import write_sweep_report

HOSTILE = "<script>alert(1)</script>"


def make_sweep(out, trials):
    for trial in trials:
        run = out / trial["name"]
        run.mkdir(parents=True)
        lines = [{"type": "train", "step": s, "loss": 3 / s} for s in range(1, 7)]
        lines += [{"type": "eval", "step": 6, "loss": 0.5}, {"type": "rung", "step": 3, "loss": 0.9}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"config": {"model": "tiny"}, "options": {"search": "halving", "at_once": 4}, "trials": trials}
    (out / "sweep.json").write_text(json.dumps(record | {"best": "b"}))
    return out


def trial(name, lr, status="finished", **more):
    settings = {"train.lr": lr, "adapter.init": "kaiming" if lr < 1 else "pissa"}
    values = {"name": name, "settings": settings, "status": status, "step": 6, "total_steps": 6}
    return values | {"loss": 0.7, "heldout": 0.5, "reason": "", "alone": ""} | more


def test_the_page_ranks_plots_and_says_why_runs_ended(tmp_path):
    trials = [
        trial("a", 1e-4, "stopped", heldout=0.4, step=3, reason="in the worse half"),
        trial("b", 1e-3, heldout=0.45),
        trial("c", 5.0, "diverged", heldout=None, reason=HOSTILE),
        trial("d", 1e-2, alone="it adapts the output head"),
    ]
    path = write_sweep_report(make_sweep(tmp_path / "sweep", trials))
    html = path.read_text()
    page = Page(html)
    assert HOSTILE not in html and "alert(1)" in page.text
    order = [page.text.index(f"{n} {lr} ") for n, lr in (("b", "0.001"), ("d", "0.01"), ("a", "0.0001"), ("c", "5.0"))]
    assert order == sorted(order)
    for part in ("4 adapters on tiny", "halving, 4 at once", "2 finished", "1 stopped", "in the worse half"):
        assert part in page.text, part
    assert "trained by itself: it adapts the output head" in page.text and "⚠ diverged" in page.text
    assert html.count("<svg") == 3  # two losses, one setting; only pissa diverged, so one value of init is left
    assert "train:\n  lr: 0.001" in html and "http" not in html.replace("http://www.w3.org", "")


def test_texts_on_an_axis_stay_as_they_are_and_fit(tmp_path):
    values = ["(q_proj$|v_proj$)", "a folder with a long name/customers of the north.jsonl", "all-linear"]
    trials = [trial(name, 1e-3) for name in "bcd"]
    for one, value in zip(trials, values):
        one["settings"] = {"adapter.target_modules": value}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = write_sweep_report(make_sweep(tmp_path / "sweep", trials)).read_text()
    texts = re.findall("<text[^>]*>([^<]*)</text>", html)
    assert "(q_proj$|v_proj$)" in texts and "all-linear" in texts
    assert any(text.startswith("…") and text.endswith("north.jsonl") for text in texts)


def test_damaged_and_unfinished_sweeps(tmp_path):
    out = make_sweep(tmp_path / "sweep", [trial("b", 1e-3, "waiting", heldout=None, loss=None)])
    (out / "b" / "metrics.jsonl").write_text('not json\n{"type": "train", "step": 1, "loss": 1.0}\n')
    assert "not a JSON record" in Page(write_sweep_report(out).read_text()).text
    (out / "sweep.json").write_text("{}")
    with pytest.raises(RunError, match="lists no trials"):
        write_sweep_report(out)
    with pytest.raises(RunError, match="holds no sweep"):
        write_sweep_report(tmp_path)

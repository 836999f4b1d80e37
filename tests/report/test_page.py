import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml
from runs import EVAL, HOSTILE, PROVENANCE, make_run

from veneer.errors import RunError
from veneer.report.page import compare, score_rows, write_report

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "rect"}


class Page(HTMLParser):
    """Collects a page's tags, attributes and text, and checks that the tags nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.text).replace("\xa0", " ").split())

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def page(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_a_whole_run(tmp_path):
    found = page(make_run(tmp_path / "receipts"))
    for part in (
        "LoRA adapter for smollm2-135m-instruct · rank 16 · alpha 32 · targets all-linear",
        "Exact match 0.0 % → 85.0 %",
        "100.0 % (60 of 60)",
        "F1 of amount 30.0 % 97.0 % +67.0",
        "4,884,480",
        "31 min 26 s 300 steps, 450,000 tokens",
        "down_proj 30 16 576 × 1,536 1,013,760",
        "⚠ 3",
        "⚠ 2 no supervised token",
        "✗ not valid JSON",
        "✗ differs in date",
        "✓ correct",
        "veneer chat",
        "micro_batch_tokens: 2048",
        '"seed": 0',
    ):
        assert part in found.text, part
    assert found.tags.count("svg") == 3 and found.tags.count("article") == 2
    assert sorted(p.name for p in (tmp_path / "receipts").iterdir())[-1] == "report.html"
    assert not list((tmp_path / "receipts").glob("*.tmp"))


def test_hostile_text_is_shown_and_not_run(tmp_path):
    evaluation = json.loads(json.dumps(EVAL))
    evaluation["heldout"] = HOSTILE
    evaluation["base"]["field_f1"][HOSTILE] = 0.5
    evaluation["samples"][0]["prompt"][0] = {"role": HOSTILE, "content": HOSTILE}
    run = make_run(tmp_path / "run", evaluation=evaluation)
    provenance = json.dumps({**PROVENANCE, "started": HOSTILE, "base": {"name_or_path": HOSTILE}})
    (run / "provenance.json").write_text(provenance)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": HOSTILE, "adapter": {"rank": HOSTILE}}))
    found = page(run)
    assert not {"script", "img"} & set(found.tags)
    assert found.text.count('<script>alert("x")</script>') >= 7
    assert "{{ 7*7 }}" in found.text
    assert not [name for name, _ in found.attributes if name.startswith("on")]


def test_self_contained(tmp_path):
    run = make_run(tmp_path / "run")
    found = page(run)
    assert not {"script", "link", "iframe", "object", "embed"} & set(found.tags)
    fetched = [value for name, value in found.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert fetched and all(value.startswith("#") for value in fetched)
    html = (run / "report.html").read_text()
    assert all(target.startswith("#") for target in re.findall(r"url\((.)", html)) and "@import" not in html
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in fetched} <= set(ids)
    assert len(html) < 100_000


def test_what_is_missing_is_said(tmp_path):
    (tmp_path / "config.yaml").write_text("model: tiny\n")
    found = page(tmp_path)
    assert "Not evaluated yet." in found.text and "No training step has been recorded yet." in found.text
    assert found.text.count("Not recorded yet.") == 2 and "LoRA adapter for tiny" in found.text


def test_not_a_run(tmp_path):
    with pytest.raises(RunError, match="no such run directory"):
        write_report(tmp_path / "none")
    with pytest.raises(RunError, match="not a run directory"):
        write_report(tmp_path)


def test_damaged_parts_are_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "eval.json").write_text('{"n": ')
    (run / "config.yaml").write_text("[1, 2")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"type": "train", "st')
    found = page(run)
    assert "eval.json is damaged" in found.text and "config.yaml is damaged" in found.text
    assert "300 steps" in found.text and "metrics" not in found.text


def test_loss_that_was_not_finite_is_named(tmp_path):
    run = make_run(tmp_path / "run", steps=20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"type": "train", "step": 21, "loss": null, "loss_text": "nan"}\n')
    assert "not a finite number at step 21" in page(run).text


def _spoil(values, bad):
    """Every copy of `values` in which one part, at any depth, is `bad`."""
    yield bad
    for key in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        for spoiled in _spoil(values[key], bad):
            copy = dict(values) if isinstance(values, dict) else list(values)
            copy[key] = spoiled
            yield copy


@pytest.mark.parametrize("bad", [None, "text", 7, float("nan"), [], [3], {"a": 1}])
def test_no_odd_value_breaks_the_page(tmp_path, bad):
    run = make_run(tmp_path / "run", steps=3)
    small = {**PROVENANCE, "adapter": {**PROVENANCE["adapter"], "targets": PROVENANCE["adapter"]["targets"][:1]}}
    config = yaml.safe_load((run / "config.yaml").read_text())
    config = {"model": "m", "data": config["data"]["train"], "adapter": config["adapter"]}
    for name, whole in (("provenance.json", small), ("eval.json", EVAL), ("config.yaml", config)):
        kept = (run / name).read_text()
        for spoiled in _spoil(whole, bad):
            (run / name).write_text(json.dumps(spoiled))
            write_report_without_plots(run)
        (run / name).write_text(kept)


def write_report_without_plots(run):
    (run / "metrics.jsonl").unlink(missing_ok=True)
    Page(write_report(run).read_text())


@pytest.mark.parametrize(
    "answer, reference, right, why",
    [
        (" yes\n", "yes", True, None),
        ("no", "yes", False, "differs"),
        ('{"b": 1, "a": 2.0}', '{"a": 2, "b": 1}', True, None),
        ('{"a": 1, "c": null}', '{"a": 2, "b": 1}', False, "differs in a, b, c"),
        ("[1]", '{"a": 2}', False, "differs"),
        ("[1, 2]", "[1,2]", True, None),
        ("a: 2", '{"a": 2}', False, "not valid JSON"),
        ("42.0", "42", False, "differs"),
    ],
)
def test_compare(answer, reference, right, why):
    found = compare(answer, reference)
    assert found["right"] is right and (right or found["why"] == why)


def test_scores_of_a_task_without_json():
    rows = score_rows({"n": 8, "base": {"n": 8, "exact_match": 0.25}, "adapter": {"n": 8, "exact_match": 0.5}})
    assert [(row["name"], row["base"], row["adapter_count"]) for row in rows] == [("Exact match", 0.25, "4 of 8")]


def test_report_survives_a_failed_rewrite(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=3)
    before = write_report(run).read_text()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunError, match="cannot write the report: No space left"):
        write_report(run)
    assert (run / "report.html").read_text() == before


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(tmp_path, width):
    html = write_report(make_run(tmp_path / "run")).read_text()
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"""<!doctype html><meta charset=utf-8><iframe id=f style="width:{width}px;height:900px;border:0"></iframe>
        <p id=out></p><script>const f = document.getElementById('f');
        f.onload = () => {{ const d = f.contentDocument;
          for (const part of d.querySelectorAll('details')) part.open = true;
          const texts = d.querySelectorAll('svg text').length;
          document.getElementById('out').textContent =
            `width=${{d.documentElement.scrollWidth}} texts=${{texts}} loss=${{
              Math.round(d.querySelector('.curves svg').getBoundingClientRect().width)}}`; }};
        f.srcdoc = {json.dumps(html).replace("</", "<" + chr(92) + "/")};</script>""",
        encoding="utf-8",
    )
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=5000"
    command = ["chromium", *options.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = re.search(r'<p id="out">width=(\d+) texts=(\d+) loss=(\d+)', done.stdout)
    assert found, done.stderr[-2000:]
    assert int(found[1]) <= width and int(found[2]) > 20 and int(found[3]) > 300
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]

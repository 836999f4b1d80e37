"""report.html: one self-contained page that says what a run trained, on what, how it went and what it changed."""

from __future__ import annotations

import json
import os
import shlex
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from veneer.errors import RunError
from veneer.report import plots, text
from veneer.report.run import RunFiles, is_number, mapping, numbers, read_run

SCORE_NAMES = {"valid_json": "Valid JSON", "exact_match": "Exact match", "field_f1_mean": "Field F1, mean"}
COUNTED = ("valid_json", "exact_match")  # shares of the examples, so that share × n is a count


def write_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html from whatever the run holds so far, and return its path."""
    run = read_run(run_dir)
    target = run.path / "report.html"
    temporary = target.with_name("report.html.tmp")
    try:
        temporary.write_text(render(run), encoding="utf-8", errors="replace")
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(f"{target}: cannot write the report: {error.strerror}") from None
    return target


def render(run: RunFiles) -> str:
    """The page as HTML; every value from the run is escaped."""
    curves = {
        "loss": plots.loss_plot(run.metrics),
        "lr": plots.lr_plot(run.metrics),
        "speed": plots.speed_plot(run.metrics),
    }
    return (
        environment()
        .get_template("page.html")
        .render(
            name=run.path.resolve().name,
            problems=run.problems,
            facts=facts(run),
            adapter=adapter(run),
            progress=progress(run),
            scores=score_rows(run.eval),
            evaluation=run.eval,
            samples=sample_rows(run.eval),
            data=data_rows(run),
            curves={name: Markup(svg) for name, svg in curves.items() if svg},
            config_yaml=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
            provenance_json=json.dumps(run.provenance, indent=2, ensure_ascii=False) if run.provenance else "",
            commands=commands(run),
            provenance=run.provenance,
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def facts(run: RunFiles) -> list[str]:
    """What stands under the title: adapter settings and the time of the start."""
    config, done = mapping(run.config.get("adapter")), []
    if config.get("rank"):
        done.append(f"rank {config['rank']}")
    if config.get("alpha"):
        done.append(f"alpha {text.number(config['alpha'])}{' (rsLoRA)' if config.get('rslora') else ''}")
    targets = config.get("target_modules")
    if targets:
        done.append(f"targets {', '.join(map(str, targets)) if isinstance(targets, list) else targets}")
    if run.provenance.get("started"):
        done.append(f"started {str(run.provenance['started'])[:16].replace('T', ' ')}")
    return [f"LoRA adapter for {run.base_name or 'an unknown base'}", *done]


def adapter(run: RunFiles) -> dict[str, Any]:
    """The adapter's counts and its targets, as the trainer noted them."""
    values = mapping(run.provenance.get("adapter"))
    targets = values.get("targets")
    return {**values, "targets": [mapping(target) for target in targets] if isinstance(targets, list) else []}


def progress(run: RunFiles) -> dict[str, Any]:
    """Steps, time, tokens and losses so far; keys only for what the metrics hold."""
    train = [record for record in run.metrics if record.get("type") == "train"]
    heldout = plots.series(run.metrics, "eval", "loss")
    losses = plots.smooth(plots.series(run.metrics, "train", "loss"))
    done: dict[str, Any] = {}
    if train:
        done["steps"] = train[-1].get("step")
        done["seconds"] = sum(numbers(train, "seconds"))
        done["tokens"] = sum(numbers(train, "tokens"))
        done["memory"] = max(numbers(train, "memory_bytes"), default=0)
        done["not_finite"] = [record.get("step") for record in train if "loss_text" in record]
    if losses:
        done["first_loss"], done["last_loss"] = losses[0][1], losses[-1][1]
    if heldout:
        done["best_step"], done["heldout_best"] = min(heldout, key=lambda point: point[1])
        done["heldout_first"] = heldout[0][1]
    return done


def score_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows (name, base, adapter, counts, field or not) of the before/after table; [] without an evaluation."""
    sides = {side: mapping(evaluation.get(side)) for side in ("base", "adapter")}
    rows = []
    for key, name in SCORE_NAMES.items():
        row: dict[str, Any] = {"name": name}
        for side, scores in sides.items():
            row[side] = _score(scores.get(key))
            if key in COUNTED and row[side] is not None and is_number(scores.get("n")):
                row[f"{side}_count"] = f"{round(row[side] * scores['n'])} of {scores['n']}"
        rows.append(row)
    fields = {side: mapping(scores.get("field_f1")) for side, scores in sides.items()}
    for name in dict.fromkeys([*fields["base"], *fields["adapter"]]):
        rows.append({"name": name, "field": True} | {side: _score(fields[side].get(name)) for side in sides})
    return [row for row in rows if row["base"] is not None or row["adapter"] is not None]


def sample_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The paired samples, each answer with whether it agrees with the reference and where it does not."""
    samples = evaluation.get("samples")
    rows = []
    for sample in map(mapping, samples if isinstance(samples, list) else []):
        reference, prompt = str(sample.get("reference", "")), sample.get("prompt")
        turns = [mapping(turn) for turn in prompt] if isinstance(prompt, list) else [{"content": prompt}]
        answers = [
            {"who": who, "text": str(sample[key]), **compare(str(sample[key]), reference)}
            for key, who in (("base", "Base"), ("adapter", "With adapter"))
            if key in sample
        ]
        rows.append(
            {
                "turns": [{"role": str(turn.get("role", "prompt")), "content": turn.get("content")} for turn in turns],
                "reference": reference,
                "answers": answers,
            }
        )
    return rows


def compare(answer: str, reference: str) -> dict[str, Any]:
    """Whether an answer equals the reference, as JSON where that is an object or list, and which fields differ."""
    expected = _json(reference)
    if not isinstance(expected, (dict, list)):
        return {"right": answer.strip() == reference.strip(), "why": "differs"}
    found = _json(answer)
    if not isinstance(found, (dict, list)):
        return {"right": False, "why": "not valid JSON" if found is None else "differs"}
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return {"right": found == expected, "why": "differs"}
    missing = object()
    keys = dict.fromkeys([*expected, *found])
    wrong = [key for key in keys if found.get(key, missing) != expected.get(key, missing)]
    return {"right": not wrong, "why": "differs in " + ", ".join(wrong)}


def data_rows(run: RunFiles) -> list[dict[str, Any]]:
    """One row for each part of the data, with what was cut or left out."""
    rows = []
    for part, values in mapping(run.provenance.get("data")).items():
        counts = mapping(mapping(values).get("counts"))
        dropped = counts.get("dropped")
        reasons = dropped if isinstance(dropped, dict) else {"dropped": dropped}
        source = mapping(run.config.get("data")).get(part)
        tokens, supervised = counts.get("tokens"), counts.get("supervised_tokens")
        rows.append(
            {
                "part": {"train": "Training", "heldout": "Held-out"}.get(part, part),
                "source": ", ".join(map(str, source)) if isinstance(source, list) else source,
                "counts": counts,
                "share": supervised / tokens if is_number(tokens) and is_number(supervised) and tokens else None,
                "hash": str(mapping(values).get("hash") or "")[:16],
                "dropped": [f"{text.number(n)} {str(why).replace('_', ' ')}" for why, n in reasons.items() if n],
            }
        )
    return rows


def commands(run: RunFiles) -> dict[str, str]:
    """Shell commands to repeat, try and score the run; paths from the current directory where it lies below."""
    try:
        path = run.path.resolve().relative_to(Path.cwd())
    except ValueError:
        path = run.path
    adapter_path = str(path / "adapter")
    return {
        "train": shlex.join(["veneer", "train", str(path / "config.yaml"), "--out", f"{path}-again"]),
        "chat": shlex.join(["veneer", "chat", adapter_path]),
        "eval": shlex.join(["veneer", "eval", str(path)]),
        "peft": f"from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, {adapter_path!r})",
    }


@cache
def environment() -> Environment:
    """Templates of this folder, with the page's filters."""
    environment = Environment(
        loader=PackageLoader("veneer", "report"),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": text.number,
        "percent": text.percent,
        "size": text.size,
        "duration": text.duration,
    }
    return environment


def _score(value: Any) -> float | None:
    return value if is_number(value) else None


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None

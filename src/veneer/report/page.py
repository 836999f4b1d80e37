"""report.html: one self-contained page that says what a run trained, on what, how it went and what it changed."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from veneer.errors import RunError, VeneerError
from veneer.report import plots
from veneer.train.metrics import FILE_NAME, read_metrics

FILES = ("config.yaml", "provenance.json", FILE_NAME)
SCORE_NAMES = {"valid_json": "valid JSON", "exact_match": "exact match", "field_f1_mean": "field F1, mean"}


@dataclass
class RunFiles:
    """What a run directory holds; parts that are not there yet are empty, damaged ones are named in `problems`."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    eval: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_run(run_dir: str | Path) -> RunFiles:
    """Read a run directory. Raises `RunError` if it is none."""
    path = Path(run_dir)
    if not path.is_dir():
        raise RunError(f"{path}: no such run directory")
    if not any((path / name).exists() for name in FILES):
        raise RunError(f"{path}: not a run directory (it has none of {', '.join(FILES)})")
    run = RunFiles(path)
    run.config = _read(run, "config.yaml", yaml.safe_load)
    run.provenance = _read(run, "provenance.json", json.loads)
    run.eval = _read(run, "eval.json", json.loads)
    try:
        run.metrics = read_metrics(path)
    except VeneerError as error:
        run.problems.append(str(error))
    return run


def write_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html from whatever the run holds so far, and return its path."""
    run = read_run(run_dir)
    target = run.path / "report.html"
    temporary = target.with_name("report.html.tmp")
    try:
        temporary.write_text(render(run), encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(f"{target}: cannot write the report: {error.strerror}") from None
    return target


def render(run: RunFiles) -> str:
    """The page as HTML; every value from the run is escaped."""
    environment = Environment(
        loader=PackageLoader("veneer", "report"),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "size": size, "plain": plain}
    curves = {
        "loss": plots.loss_plot(run.metrics),
        "lr": plots.lr_plot(run.metrics),
        "speed": plots.speed_plot(run.metrics),
    }
    return environment.get_template("page.html").render(
        run=run,
        name=run.path.resolve().name,
        base=base_name(run),
        adapter=_mapping(run.provenance.get("adapter")),
        progress=progress(run),
        scores=score_rows(run.eval),
        samples=sample_rows(run.eval),
        data=data_rows(run),
        curves={name: Markup(svg) for name, svg in curves.items() if svg},
        config_yaml=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
        provenance_json=json.dumps(run.provenance, indent=2, ensure_ascii=False) if run.provenance else "",
        commands=commands(run),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def base_name(run: RunFiles) -> str:
    return str(_mapping(run.provenance.get("base")).get("name_or_path") or run.config.get("model") or "unknown base")


def progress(run: RunFiles) -> dict[str, Any]:
    """Steps, time, tokens and losses so far; keys only for what the metrics hold."""
    train = [record for record in run.metrics if record.get("type") == "train"]
    heldout = plots.series(run.metrics, "eval", "loss")
    losses = plots.smooth(plots.series(run.metrics, "train", "loss"))
    done: dict[str, Any] = {}
    if train:
        done["steps"] = train[-1].get("step")
        done["seconds"] = sum(record.get("seconds") or 0 for record in train)
        done["tokens"] = sum(record.get("tokens") or 0 for record in train)
        done["memory"] = max((record.get("memory_bytes") or 0 for record in train), default=0)
        done["not_finite"] = [record.get("step") for record in train if "loss_text" in record]
    if losses:
        done["first_loss"], done["last_loss"] = losses[0][1], losses[-1][1]
    if heldout:
        done["heldout_first"], done["heldout_last"] = heldout[0][1], heldout[-1][1]
        done["best_step"], done["heldout_best"] = min(heldout, key=lambda point: point[1])
    return done


def score_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows (name, base, adapter, count of each, is a field) of the before/after table; [] without an evaluation."""
    before, after = _mapping(evaluation.get("base")), _mapping(evaluation.get("adapter"))
    rows = []
    for key, name in SCORE_NAMES.items():
        if _number(before.get(key)) or _number(after.get(key)):
            rows.append({"key": key, "name": name, "base": before.get(key), "adapter": after.get(key)})
    for row in rows:
        for side, scores in (("base", before), ("adapter", after)):
            if row["key"] != "field_f1_mean" and _number(scores.get("n")) and _number(row[side]):
                row[f"{side}_count"] = f"{round(row[side] * scores['n'])} of {scores['n']}"
    fields_before, fields_after = _mapping(before.get("field_f1")), _mapping(after.get("field_f1"))
    for name in dict.fromkeys([*fields_before, *fields_after]):
        rows.append({"name": name, "base": fields_before.get(name), "adapter": fields_after.get(name), "field": True})
    return rows


def sample_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The paired samples, each answer with whether it agrees with the reference and where it does not."""
    samples = evaluation.get("samples")
    rows = []
    for sample in samples if isinstance(samples, list) else []:
        sample = _mapping(sample)
        reference = str(sample.get("reference", ""))
        prompt = sample.get("prompt")
        turns = [_mapping(turn) for turn in prompt] if isinstance(prompt, list) else [{"content": prompt}]
        answers = [
            {"who": who, "text": str(sample[key]), **compare(str(sample[key]), reference)}
            for key, who in (("base", "Base"), ("adapter", "With adapter"))
            if key in sample
        ]
        rows.append({"turns": turns, "reference": reference, "answers": answers})
    return rows


def compare(answer: str, reference: str) -> dict[str, Any]:
    """Whether an answer equals the reference, as JSON where both are, and which fields of it differ."""
    try:
        expected = json.loads(reference)
    except ValueError:
        return {"right": answer.strip() == reference.strip(), "why": "differs"}
    try:
        found = json.loads(answer)
    except ValueError:
        return {"right": False, "why": "differs" if not isinstance(expected, (dict, list)) else "not valid JSON"}
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return {"right": found == expected, "why": "differs"}
    wrong = [key for key in dict.fromkeys([*expected, *found]) if _differs(found, expected, key)]
    return {"right": not wrong, "why": "differs in " + ", ".join(wrong)}


def data_rows(run: RunFiles) -> list[dict[str, Any]]:
    """One row for each data part, with what was cut or left out as warnings."""
    rows = []
    for part, values in _mapping(run.provenance.get("data")).items():
        counts = _mapping(_mapping(values).get("counts"))
        dropped = counts.get("dropped")
        reasons = dropped if isinstance(dropped, dict) else {"dropped": dropped}
        warnings = [f"{number(count)} {str(reason).replace('_', ' ')}" for reason, count in reasons.items() if count]
        rows.append(
            {
                "part": {"train": "training", "heldout": "held-out"}.get(part, part),
                "source": _mapping(run.config.get("data")).get(part),
                "counts": counts,
                "hash": _mapping(values).get("hash"),
                "truncated": counts.get("truncated"),
                "dropped": warnings,
            }
        )
    return rows


def commands(run: RunFiles) -> list[tuple[str, str]]:
    """(what for, shell command or code) to repeat, try, score and use the run."""
    try:
        path = run.path.resolve().relative_to(Path.cwd())
    except ValueError:
        path = run.path
    quoted, adapter = shlex.quote(str(path)), shlex.quote(str(path / "adapter"))
    base = base_name(run)
    return [
        (
            "Train it again",
            f"veneer train {shlex.quote(str(path / 'config.yaml'))} --out {shlex.quote(f'{path}-again')}",
        ),
        ("Talk to it", f"veneer chat {adapter}"),
        ("Score it against its base", f"veneer eval {quoted}"),
        (
            "Use it from Python with PEFT",
            "from transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({base!r})\n"
            f"model = PeftModel.from_pretrained(model, {str(path / 'adapter')!r})",
        ),
    ]


def number(value: Any) -> str:
    """A count or a measurement for people: thousands separated, four significant digits; "–" for none."""
    if not _number(value):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if _number(value) else "–"


def size(value: Any) -> str:
    """Bytes for people, in powers of 1024."""
    if not _number(value):
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def plain(seconds: Any) -> str:
    """A duration for people."""
    if not _number(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _differs(found: dict[str, Any], expected: dict[str, Any], key: str) -> bool:
    return key not in found or key not in expected or found[key] != expected[key]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(run: RunFiles, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        values = parse((run.path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        run.problems.append(f"{name} is damaged and was left out.")
        return {}
    return values

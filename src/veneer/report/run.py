"""Reading a run directory, whole or not: what is not there yet is empty, what is damaged is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from veneer.errors import RunError
from veneer.training.metrics import FILE_NAME, read_metrics

FILES = ("config.yaml", "provenance.json", FILE_NAME)


@dataclass
class RunFiles:
    """What a run directory holds; parts that are not there yet are empty, damaged ones are named in `problems`."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    eval: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def base_name(self) -> str | None:
        name = mapping(self.provenance.get("base")).get("name_or_path") or self.config.get("model")
        return str(name) if name else None


def is_run(path: Path) -> bool:
    return any((path / name).exists() for name in FILES)


def read_run(run_dir: str | Path) -> RunFiles:
    """Read a run directory. Raises `RunError` if it is none."""
    path = Path(run_dir)
    if not path.is_dir():
        raise RunError(f"{path}: no such run directory")
    if not is_run(path):
        raise RunError(f"{path}: not a run directory (it has none of {', '.join(FILES)})")
    run = RunFiles(path)
    run.config = _read(run, "config.yaml", yaml.safe_load)
    run.provenance = _read(run, "provenance.json", json.loads)
    run.eval = _read(run, "eval.json", json.loads)
    try:
        run.metrics = read_metrics(path)
    except RunError as error:
        run.problems.append(str(error))
    return run


def is_number(value: Any) -> bool:
    """Whether a value read from a file is a finite number (and no truth value)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def numbers(records: list[dict[str, Any]], key: str) -> list[float]:
    """The finite numbers that records hold under `key`."""
    return [record[key] for record in records if is_number(record.get(key))]


def _read(run: RunFiles, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        values = parse((run.path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        run.problems.append(f"{name} is damaged and was left out")
        return {}
    return values

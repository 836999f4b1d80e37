"""metrics.jsonl: one JSON record a line, flushed as it happens, and its copies in TensorBoard, W&B or trackio.

The file is the truth: a sink that fails while the run goes on is dropped with a warning, and a resumed run first drops
the records that came after its checkpoint.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, RunError
from veneer.files import write_text

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends records to run_dir/metrics.jsonl and forwards their numbers to the sinks that were asked for."""

    def __init__(self, run_dir: str | Path, sinks: Sequence[str] = (), config: dict[str, Any] | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / FILE_NAME
        unknown = [name for name in sinks if name not in SINKS]
        if unknown:
            raise ConfigError(f"log_to: unknown sink {unknown[0]!r}; known: {', '.join(SINKS)}")
        self._sinks = {name: SINKS[name](self.run_dir, config or {}) for name in sinks}
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _end_last_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.path}: cannot write the metrics: {error.strerror}") from None

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. A NaN or infinite number is written as null, with its name under "<key>_text"."""
        try:
            self._file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self.path}: cannot write the metrics: {error.strerror}") from None
        prefix = record.get("type", "train")
        numbers = {f"{prefix}/{key}": float(value) for key, value in record.items() if _is_number(value, key)}
        for name, sink in list(self._sinks.items()):
            try:
                sink.log(numbers, int(record.get("step", 0)))
            except Exception as error:  # a logger's fault must not cost the run
                del self._sinks[name]
                warnings.warn(f"{name} failed and is left out from here on: {error}", stacklevel=2)

    def truncate_after(self, step: int) -> None:
        """Drop the records after `step`, and a torn last line, in one atomic replacement."""
        self._file.close()
        kept = [record for record in read_metrics(self.run_dir) if record.get("step", 0) <= step]
        write_text(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks.values():
            sink.close()
        self._sinks = {}

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run, [] if it has none yet. A last line torn by a kill is left out; other damage raises."""
    path = Path(run_dir) / FILE_NAME
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path}: cannot read the metrics: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise RunError(f"{path}:{number}: not a JSON record; remove the line to go on")
    return records


class _TensorBoard:
    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        _need("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Offline unless WANDB_API_KEY is set, so that it never waits for a login or a network."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        wandb = _need("wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "veneer"),
            name=run_dir.name,
            dir=str(run_dir),
            config=config,
            mode=mode,
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """Trackio keeps its own local database; nothing is sent unless the user has set it up to."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        self._trackio = _need("trackio")
        self._trackio.init(project=os.environ.get("TRACKIO_PROJECT", "veneer"), name=run_dir.name, config=config)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._trackio.log({**numbers, "step": step})

    def close(self) -> None:
        self._trackio.finish()


SINKS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def _need(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"log_to: {name} is not installed; run: pip install veneer[{name}]") from None


def _finite(value: Any) -> Any:
    """`value` as JSON can hold it: in a mapping, a non-finite number becomes null and "<key>_text" names it."""
    if isinstance(value, dict):
        done = {key: _finite(item) for key, item in value.items()}
        done |= {f"{key}_text": str(item) for key, item in value.items() if _is_non_finite(item)}
        return done
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if _is_non_finite(value) else value


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_number(value: Any, key: str) -> bool:
    return key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)


def _end_last_line(path: Path) -> None:
    """Cut off a last line that a kill tore, so that the next record starts a line of its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)

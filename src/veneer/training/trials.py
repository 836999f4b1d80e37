"""The trials of a sweep: their names, settings and how they stand, as sweep.json has them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.config import TrainConfig
from veneer.errors import ConfigError, RunError
from veneer.training.metrics import read_metrics

FILE, PAGE = "sweep.json", "report.html"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.,=+_-]*")
DONE = ("finished", "early")
"""How a trial stands that came to an end of its own."""
OVER = (*DONE, "diverged", "stopped")
"""How a trial can stand when nothing is left to do for it; "stopped" is by halving. Else it is "waiting"."""


def score(status: str | None, heldout: float | None, loss: float | None) -> float | None:
    """What trials are compared by, lower is better; None if there is nothing to compare."""
    return None if status == "diverged" else loss if heldout is None else heldout


def rank(status: str | None, heldout: float | None, loss: float | None) -> tuple[bool, bool, bool, float]:
    """Trials in order of this are the best first: those that came to their end, each kind by its score. A training loss is
    no match for a held-out one."""
    found = score(status, heldout, loss)
    return status not in DONE, found is None, heldout is None, found or 0.0


@dataclass
class Trial:
    """One adapter of a sweep. `settings` are what it has of its own, by dotted key; `heldout` is the held-out loss of the
    adapter that it left, `rungs` those at the rungs that it reached."""

    name: str
    settings: dict[str, Any]
    status: str = "waiting"
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    heldout: float | None = None
    seconds: float = 0.0
    rungs: list[float] = field(default_factory=list)
    alone: str = ""
    """Why it trained by itself, if it did."""
    reason: str = ""
    """Why it ended before its last step, if it did."""

    @property
    def score(self) -> float | None:
        """See `score`."""
        return score(self.status, self.heldout, self.loss)

    @property
    def rank(self) -> tuple[bool, bool, bool, float]:
        """See `rank`."""
        return rank(self.status, self.heldout, self.loss)


def base_key(config: TrainConfig) -> str:
    """What adapters must have in common to train on one base in one pass."""
    train = config.train
    parts = [config.model, config.dtype, config.device, config.quant, config.data.chat_template]
    parts += [train.compile, train.checkpointing, config.adapter.new_tokens, train.stream, train.resident_blocks]
    if config.adapter.init == "loftq":  # it takes the base's original weights
        parts.append("loftq")
    return json.dumps(parts)


def named_trials(settings: list[dict[str, Any]], names: list[str] | None = None) -> list[Trial]:
    """Trials of these settings; a name tells its number and what it has of its own, unless it is given."""
    width = len(str(len(settings)))
    made = [f"{i:0{width}d}{_short(own)}" for i, own in enumerate(settings, 1)]
    return [Trial(name, own) for name, own in zip(names or made, settings)]


def _short(settings: dict[str, Any]) -> str:
    parts = []
    for key, value in settings.items():
        text = (
            f"{value:g}"
            if isinstance(value, float)
            else "+".join(map(str, value))
            if isinstance(value, list)
            else value
        )
        parts.append(f"-{key.rpartition('.')[2]}={text}")
    return re.sub(r"[^A-Za-z0-9.,=+_-]", "_", "".join(parts))[:80]


def listed(values: dict[str, Any]) -> tuple[dict[str, Any], list[Trial]]:
    """A configuration with a list `adapters` → what they share, and a trial for each entry.

    An entry holds what the adapter has of its own, laid out as a configuration, and if wanted a `name`. Raises
    `ConfigError`.
    """
    shared = {key: value for key, value in values.items() if key != "adapters"}
    entries = values.get("adapters")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError("adapters: expected a list, each entry with its own name, adapter, train, data or seed")
    names = []
    for number, entry in enumerate(entries, 1):
        name = str(entry.get("name", f"adapter-{number}"))
        if not NAME.fullmatch(name):
            raise ConfigError(f"adapters: name {name!r} becomes a folder: use letters, digits and . , = + _ -")
        if name in (FILE, PAGE):
            raise ConfigError(f"adapters: name {name!r} is a file's of the sweep itself: choose another")
        if wrong := [key for key in ("model", "out") if key in entry]:
            raise ConfigError(f"adapters: {name} sets {wrong[0]!r}, which all adapters share: set it above the list")
        names.append(name)
    own = [_dotted({key: value for key, value in entry.items() if key != "name"}) for entry in entries]
    return shared, named_trials(own, names)


def _dotted(entry: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in entry.items():
        if key == "data" and not isinstance(value, dict):
            found["data.train"] = value
        elif key in ("data", "adapter", "train") and isinstance(value, dict):
            found |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            found[key] = value
    return found


def last_losses(run: Path) -> tuple[float | None, float | None]:
    """(mean training loss of the last tenth of the steps, last held-out loss) of a run."""
    records = read_metrics(run)
    train = [r["loss"] for r in records if r.get("type") == "train" and isinstance(r.get("loss"), float)]
    heldout = [r["loss"] for r in records if r.get("type") == "eval" and isinstance(r.get("loss"), float)]
    last = train[-max(1, len(train) // 10) :]
    return sum(last) / len(last) if last else None, heldout[-1] if heldout else None


def read_sweep(out: str | Path) -> dict[str, Any]:
    """The content of a sweep's sweep.json. Raises `RunError`."""
    path = Path(out) / FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{out} holds no sweep: it has no {FILE}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("trials"), list):
        raise RunError(f"{path} is damaged: it lists no trials")
    return record


def finite(value: Any) -> Any:
    """The value with null for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

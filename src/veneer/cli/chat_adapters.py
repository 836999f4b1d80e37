"""The chat's commands over the adapters that are loaded: /use, /stack, /weight, /off, /adapters, /add."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from veneer.cli.common import locate
from veneer.errors import ConfigError

HELP = {
    "/adapters": "list the adapters, with the weights of those that act",
    "/use NAME": "let one adapter act alone",
    "/stack A=0.7 B=0.3": "let several act at once, with weights",
    "/weight NAME W": "change one adapter's weight (0 takes it out)",
    "/off": "the base alone",
    "/add PATH [NAME]": "load another run or adapter of this base",
}


class Adapters:
    """Runs one line of the chat against a model's adapters; what comes back is said to the user.

    Raises a `VeneerError` that says what is wrong; nothing has changed then.
    """

    def __init__(self, model: Any, tokenizer: Any, force: bool) -> None:
        self.model, self.tokenizer, self.force = model, tokenizer, force

    def run(self, line: str) -> str | None:
        """The answer to a command; None if the line is none of these commands."""
        command, _, rest = line.partition(" ")
        commands: dict[str, Callable[[list[str]], None]] = {
            "/use": self._use,
            "/stack": self._stack,
            "/weight": self._weight,
            "/off": self._off,
            "/adapters": self._list,
            "/add": self._add,
        }
        if command not in commands:
            return None
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise ConfigError(f"{command}: {error}") from None
        commands[command](words)
        return self._described()

    @property
    def bank(self) -> Any:
        """The model's bank; None while it has no adapter."""
        from veneer.adapter.attach import BANK

        return self.model.__dict__.get(BANK)

    def _bank(self) -> Any:
        if self.bank is None:
            raise ConfigError("no adapter is loaded: /add PATH [NAME] loads one")
        return self.bank

    def _described(self) -> str:
        bank = self._bank()
        parts = [f"{name} × {bank.active[name]:g}" if name in bank.active else f"{name} (off)" for name in bank.names]
        return "adapters: " + ", ".join(parts)

    def _off(self, words: list[str]) -> None:
        self._list(words)
        self._bank().activate(None)

    def _list(self, words: list[str]) -> None:
        if words:
            raise ConfigError("/off and /adapters take nothing more")

    def _use(self, words: list[str]) -> None:
        if len(words) != 1:
            raise ConfigError("/use takes one name: /use NAME")
        self._bank().activate(words[0])

    def _stack(self, words: list[str]) -> None:
        pairs = [word.partition("=") for word in words]
        if not pairs or any(not name for name, _, _ in pairs):
            raise ConfigError("/stack takes names with weights: /stack A=0.7 B=0.3")
        if len({name for name, _, _ in pairs}) < len(pairs):
            raise ConfigError("/stack names an adapter twice")
        self._bank().activate({name: _number(value) if equals else 1.0 for name, equals, value in pairs})

    def _weight(self, words: list[str]) -> None:
        if len(words) != 2:
            raise ConfigError("/weight takes a name and a number: /weight NAME 0.5")
        bank, (name, value) = self._bank(), words
        bank.check(name)
        stack = bank.active | {name: _number(value)}
        bank.activate({one: weight for one, weight in stack.items() if weight})

    def _add(self, words: list[str]) -> None:
        if len(words) not in (1, 2):
            raise ConfigError("/add takes a path and, if wanted, a name: /add PATH [NAME]")
        self.add(*words)

    def add(self, path: str | Path, name: str | None = None) -> None:
        """Load a further adapter; who acted goes on alone, and a first adapter acts at once."""
        from veneer.formats.peft import load_adapter

        path, bank = Path(path).expanduser(), self.bank
        before = bank.active if bank is not None else None
        name = name or name_for(path, bank.names if bank is not None else ())
        options = {"force": self.force, "trainable": False, "tokenizer": self.tokenizer}
        loaded = load_adapter(self.model, locate(path)[0], name=name, **options)
        if before is not None:
            loaded.activate(before)
        self.model.eval()


def name_for(path: Path, taken: Container[str] = ()) -> str:
    """What to call an adapter: as its run's directory, or its own; with a number where that is taken."""
    adapter, run = locate(path)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", (run or adapter).resolve().name).strip("-") or "adapter"
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number") from None
    if value != value or abs(value) == float("inf"):
        raise ConfigError(f"{text!r} is not a finite number")
    return value

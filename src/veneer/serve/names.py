"""What a request's `model` means: the base, one adapter, or a weighted stack `base:first*0.7+second*0.3`."""

from __future__ import annotations

import math
import re
from collections.abc import Container

from veneer.errors import AdapterStateError, ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""An adapter's name: no slash, no character of the stack syntax, nothing that a shell or a path reads in another way."""
MAX_STACK = 8
MAX_WEIGHT = 100.0

Stack = tuple[tuple[str, float], ...]


class UnknownModel(AdapterStateError):
    """A `model` that is neither the base nor a loaded adapter, nor a stack of them."""


def check_name(name: str) -> str:
    """The name itself; `ConfigError` for one that an adapter cannot have."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"adapter name {name[:140]!r}: use letters, digits, '.', '_' and '-', first a letter or digit, 128 at most"
        )
    return name


def check_base(name: str) -> str:
    """The name that a base is served under; `ConfigError` for one that a stack could not be told from."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", name):
        raise ConfigError(f"the base's name {name[:220]!r}: use letters, digits, '.', '_', '-' and '/' (--name)")
    return name


def parse_model(model: str, base: str, loaded: Container[str]) -> Stack:
    """The adapters, each with its weight, that `model` asks for; () is the base.

    `base` is the name that the base is served under; the word `base` means it too. A stack names each adapter once and
    may leave a weight out (1). Raises `UnknownModel` for a name that is not served, `ConfigError` for a stack that is
    written wrongly.
    """
    if model in loaded:
        return ((model, 1.0),)
    if model in (base, "base"):
        return ()
    prefix = next((p for p in (f"{base}:", "base:") if model.startswith(p)), None)
    if prefix is None:
        raise UnknownModel(f"The model `{model[:200]}` does not exist.")
    parts = model[len(prefix) :].split("+")
    if len(parts) > MAX_STACK:
        raise ConfigError(f"a stack holds {MAX_STACK} adapters at most, not {len(parts)}")
    stack = tuple(_part(part.strip(), model) for part in parts)
    names = [name for name, _ in stack]
    if len(set(names)) < len(names):
        raise ConfigError(f"the stack `{model[:200]}` names an adapter twice")
    for name in names:
        if name not in loaded:
            raise UnknownModel(f"The adapter `{name}` of the stack `{model[:200]}` does not exist.")
    return stack


def _part(part: str, model: str) -> tuple[str, float]:
    name, star, weight = part.partition("*")
    name = name.strip()
    try:
        value = float(weight) if star else 1.0
    except ValueError:
        value = math.nan
    if not NAME.fullmatch(name) or not abs(value) <= MAX_WEIGHT:
        raise ConfigError(
            f"the stack `{model[:200]}` is written as base:first*0.7+second*0.3, with weights of {MAX_WEIGHT:g} at most"
        )
    return name, value

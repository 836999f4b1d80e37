"""Adapters in the folders that a server was given: which there are, and what they are called."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from veneer.errors import ConfigError


def find_adapters(folder: Path) -> list[Path]:
    """Adapter directories in a folder, sorted: itself, its children, and the `adapter` of those that are runs.

    Links inside the folder are not followed, so that nothing outside it is ever offered.
    """
    own = _adapter_in(folder)
    if own is not None:
        return [own]
    try:
        children = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
    return [found for child in children if (found := _adapter_in(child)) is not None]


def _adapter_in(folder: Path) -> Path | None:
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file() and (place == folder or not place.is_symlink()):
            return place
    return None


def short_name(adapter: Path) -> str:
    """A name for an adapter directory: its own, or its run's where it is a run's `adapter`."""
    run = adapter.name == "adapter" and (adapter.parent / "config.yaml").exists()
    name = (adapter.parent if run else adapter).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:128] or "adapter"


def name_adapters(folders: Iterable[Path]) -> dict[str, Path]:
    """The adapters of `folders` by name. `ConfigError` for a folder with none, or two adapters of one name."""
    named: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such directory")
        found = find_adapters(folder)
        if not found:
            raise ConfigError(f"{folder} holds no adapter (adapter_config.json), nor a folder with one")
        for path in found:
            name = short_name(path)
            if name in named:
                raise ConfigError(f"{path} and {named[name]} would both be called {name!r}: rename one of the folders")
            named[name] = path
    return named

"""Reading an adapter's JSON, and writing files so that a crash or a full disk never leaves a half-written one in place."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from veneer.errors import AdapterFormatError, RunError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in one of an adapter's files; `AdapterFormatError` if it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFormatError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise AdapterFormatError(f"{path} is damaged: not an object")
    return values


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one atomic step. Raises `RunError` (disk full, no permission); the old file survives."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # the folder may be none
            temporary.unlink()
        raise RunError(f"cannot write {path}: {error.strerror or error}; what was there before is kept") from None


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Fill a directory and put it in place in one step; one that stands there is replaced only once all is written.

    Yields a temporary sibling to write into. Raises `RunError` where the disk is full or refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old") if path.exists() else None
        if old:
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
        if old:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; what was there before is kept") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed write left behind in a directory; put an `.old` copy back if nothing took its place."""
    for old in directory.glob(".*.old"):
        target = directory / old.name[1:].rsplit(".", 2)[0]
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, target)
    for temporary in directory.glob(".*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)

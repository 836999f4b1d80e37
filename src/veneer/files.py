"""Reading an adapter's JSON, and writing files so that a crash or a full disk never leaves a half-written one in place."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from veneer.errors import AdapterFormatError, RunError, VeneerError

LOCK = ".lock"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in one of an adapter's files; `AdapterFormatError` if it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFormatError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
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


def settle(path: Path) -> None:
    """Bring a written file or folder to the disk, its files as readable as its folder: safetensors makes them private."""
    for file in (path, *path.rglob("*")):
        if file.is_file():
            file.chmod(file.parent.stat().st_mode & 0o666)
        _sync(file)


def refusal(error: Exception) -> str | None:
    """Why the system refused to write, in whichever library's error; None if it did not."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"([^:]+) \(os error \d+\)", str(error))  # as safetensors and tokenizers, which are Rust, say it
    return found[1].strip() if found and not isinstance(error, VeneerError) else None


@contextmanager
def writing(path: Path, kept: str = "; what was there before is kept") -> Iterator[None]:
    """Raise `RunError` where the disk is full or refuses, whichever library writes inside. `kept` ends its message."""
    try:
        yield
    except Exception as error:
        if (reason := refusal(error)) is None:
            raise
        raise RunError(f"cannot write {path}: {reason}{kept}") from None


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one atomic step. Raises `RunError` (disk full, no permission); the old file survives."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):  # the folder may be none
                temporary.unlink()
            raise


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, gone afterwards. Raises `RunError` where the disk is full or refuses."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Fill a directory and put it in place in one step; one that stands there is replaced only once all is written.

    Yields a temporary sibling to write into. Raises `RunError` where the disk is full or refuses.
    """
    path = Path(path)
    with staged(path) as temporary:
        yield temporary
        settle(temporary)
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old") if path.exists() else None
        if old:
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
        if old:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Make a directory and hold it against other processes; `RunError` if one holds it. A killed process lets go."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"another process is writing {directory}: wait for it, or choose another --out") from None
        except NotImplementedError:  # a file system without locks
            pass
    try:
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


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

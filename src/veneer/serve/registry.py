"""The adapters that can be asked for by name: where they come from, what they hold, and in which memory they lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter. `content` is a hash of its tensors and scalings; `tier` is device, host or disk; `bytes` in
    the model's dtype."""

    name: str
    path: Path
    content: str
    rank: int
    targets: int
    bytes: int
    pinned: bool
    tier: str


class Registry:
    """Adapters by name, in tiers device → host → disk. Safe to use from several threads."""

    def __init__(
        self,
        model: Any,
        *,
        allowed: list[Path],
        device_slots: int | None = None,
        host_slots: int = 256,
        max_rank: int = 64,
        max_bytes: int = 4 << 30,
    ) -> None: ...

    def load(self, name: str, path: str | Path, *, pinned: bool = False, replace: bool = False) -> AdapterInfo:
        """Read an adapter directory and make it known under a name; requests in flight keep what they began with.

        Raises `AdapterRefused`, `AdapterExists`, `AdapterFormatError`, `WrongBaseError`.
        """
        raise NotImplementedError

    def unload(self, name: str) -> None:
        """Forget an adapter; its memory is free once requests in flight are done. Raises `UnknownAdapter`."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Names of all loaded adapters, in the order they came."""
        raise NotImplementedError

    def info(self, name: str) -> AdapterInfo:
        """What is loaded under a name. Raises `UnknownAdapter`."""
        raise NotImplementedError

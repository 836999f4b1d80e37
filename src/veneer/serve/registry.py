"""The adapters that can be asked for by name, in tiers device → host → disk.

A name points to a content, and everything behind it (device slots, prefix cache, requests in flight) knows contents
only: a name that is loaded again points to another content, and the old one goes when its last request is done.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from time import monotonic
from typing import Any

from torch import Tensor

from veneer.adapter.attach import BANK
from veneer.adapter.frozen import place_of, shape_of
from veneer.base.fingerprint import fingerprint
from veneer.errors import VeneerError
from veneer.formats.peft import CONFIG, check_base
from veneer.serve.content import Content, check_files, read_again, read_content
from veneer.serve.errors import AdapterExists, AdapterRefused, ServeError, UnknownAdapter
from veneer.serve.names import NAME
from veneer.serve.stored import Stored


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
    """Adapters by name. Safe to use from several threads.

    `allowed` are the folders that adapters may lie in. `host_slots` is how many are kept in host memory: beyond it the
    ones asked for longest ago stay on disk alone and are read again when they are asked for, pinned ones never.
    `device_slots` bounds what lies on the device; None lets the engine choose. `max_bytes` bounds an adapter's file.
    """

    def __init__(
        self,
        model: Any,
        *,
        allowed: list[Path],
        device_slots: int | None = None,
        host_slots: int = 256,
        max_rank: int = 64,
        max_bytes: int = 4 << 30,
    ) -> None:
        if model.__dict__.get(BANK) is not None:
            raise ServeError("the model carries adapters: serve the bare base, and load adapters into the registry")
        self.model = model
        self.allowed = [Path(folder).expanduser().resolve() for folder in allowed]
        self.device_slots, self.host_slots = device_slots, host_slots
        self.max_rank, self.max_bytes = max_rank, max_bytes
        linears = {path: module for path, module in model.named_modules() if shape_of(module)}
        if not linears:
            raise ServeError(f"{type(model).__name__} has no linear layers that adapters could stand on")
        self.targets = {path: shape_of(module) for path, module in linears.items()}
        self.device, self.dtype = place_of(next(iter(linears.values())))
        self._base = fingerprint(model)
        self._names: dict[str, Content] = {}
        self._paths: dict[str, Path] = {}
        self._pins: set[str] = set()
        self._contents: set[Content] = set()
        self._lock = RLock()
        self._reader = ThreadPoolExecutor(1, "veneer-adapters")

    def load(self, name: str, path: str | Path, *, pinned: bool = False, replace: bool = False) -> AdapterInfo:
        """Read an adapter directory and make it known under a name; requests in flight keep what they began with.

        Raises `AdapterRefused`, `AdapterExists`, `AdapterFormatError`, `WrongBaseError`.
        """
        if not NAME.fullmatch(name):
            raise AdapterRefused("an adapter's name has letters, digits, '.', '_' and '-', and at most 128 of them")
        if name in self._names and not replace:
            raise AdapterExists(f"an adapter {name!r} is loaded already: unload it, or ask for it to be replaced")
        where = self._find(path)
        content = self._read(where)
        with self._lock:
            if name in self._names and not replace:
                raise AdapterExists(f"an adapter {name!r} is loaded already: unload it, or ask for it to be replaced")
            old = self._names.get(name)
            same = next((c for c in self._contents if c.named and c.hash == content.hash), content)
            same.host, same.stored = same.host if same.host is not None else content.host, content.stored
            content = same
            content.path, content.used = where, monotonic()
            self._contents.add(content)
            self._names[name], self._paths[name] = content, where
            self._pins = self._pins | {name} if pinned else self._pins - {name}
            content.pinned = self._pinned(content)
            if old is not None and old is not content:
                self._forget(old)
            self._trim()
            return self._info(name)

    def unload(self, name: str) -> None:
        """Forget an adapter; its memory is free once requests in flight are done. Raises `UnknownAdapter`."""
        with self._lock:
            self._get(name)
            self._paths.pop(name)
            self._pins.discard(name)
            self._forget(self._names.pop(name))

    def names(self) -> list[str]:
        """Names of all loaded adapters, in the order they came."""
        with self._lock:
            return list(self._names)

    def info(self, name: str) -> AdapterInfo:
        """What is loaded under a name. Raises `UnknownAdapter`."""
        with self._lock:
            return self._info(name)

    def tiers(self) -> dict[str, int]:
        """How many contents lie on the device, in host memory and on disk alone, old ones in use among them."""
        with self._lock:
            return {"device": 0, "host": 0, "disk": 0} | Counter(content.tier for content in self._contents)

    def close(self) -> None:
        """Stop the reading thread."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    # The engine's side

    def acquire(self, names: list[str]) -> list[Content]:
        """The contents that names point to now, held until `release`; those on disk begin to be read."""
        with self._lock:
            found = [self._get(name) for name in names]
            for content in found:
                self._drop_unused(content)  # a reading that failed when nobody waited for it any more
                content.users += 1
                content.used = monotonic()
                self._ensure(content)
            return found

    def ready(self, content: Content) -> bool:
        """Whether a content in use is on the device or can be copied there; if not, it is being read."""
        with self._lock:
            self._ensure(content)
            return content.on_device or content.host is not None

    def release(self, contents: list[Content]) -> None:
        """A request is done with its contents."""
        with self._lock:
            for content in contents:
                content.users -= 1
                self._drop_unused(content)
            self._trim()

    def extent(self, content: Content | None = None) -> tuple[int, set[str]]:
        """The largest rank and all targets of what is loaded (and of a content): what a pool should have room for."""
        with self._lock:
            known = [c for c in self._contents if c.named] + ([content] if content else [])
            return max((c.rank for c in known), default=0), {target for c in known for target in c.shapes}

    def failure(self, content: Content) -> str | None:
        """Why a content could not be read again, if it could not."""
        loading = content.loading  # once: the reading thread sets it to None
        failed = loading is not None and loading.done() and content.tier == "disk"  # it may have been loaded again
        error = loading.exception() if failed else None
        return None if error is None else str(error) if isinstance(error, VeneerError) else "its files cannot be read"

    def dead(self) -> list[Content]:
        """Contents on the device that nobody names or uses: the engine frees their slots."""
        with self._lock:
            return [c for c in self._contents if c.on_device and not c.named and not c.users]

    def left_device(self, content: Content) -> None:
        """The engine gave a content's device slot to another."""
        with self._lock:
            content.on_device = False
            self._drop_unused(content)

    # Inside

    def _ensure(self, content: Content) -> None:
        if content.host is None and not content.on_device and content.loading is None:
            content.loading = self._reader.submit(self._refill, content)

    def _get(self, name: str) -> Content:
        if name not in self._names:
            raise UnknownAdapter(f"no adapter {name!r} is loaded; there are: {', '.join(self._names) or 'none'}"[:500])
        return self._names[name]

    def _info(self, name: str) -> AdapterInfo:
        c = self._get(name)
        pinned = name in self._pins
        return AdapterInfo(name, self._paths[name], c.hash, c.rank, len(c.shapes), c.bytes, pinned, c.tier)

    def _paths_of(self, content: Content) -> list[Path]:
        """The directories of the names that point to a content."""
        return [self._paths[name] for name, other in self._names.items() if other is content]

    def _pinned(self, content: Content) -> bool:
        return any(self._names.get(name) is content for name in self._pins)

    def _find(self, path: str | Path) -> Path:
        """The adapter directory a path means, inside an allowed folder: relative ones are looked for in each."""
        text = str(path)
        if not text or "\0" in text or len(text) > 4096:
            raise AdapterRefused("the adapter's path is empty, too long or holds a zero byte")
        for folder in self.allowed:
            try:
                where = (folder / text).resolve()
                if where.is_relative_to(folder) and (where / CONFIG).exists():
                    return where
            except (OSError, RuntimeError):
                continue
        raise AdapterRefused("the path is no adapter directory inside the folders that adapters may be loaded from")

    def _read(self, where: Path) -> Content:
        check_files(where, self.allowed, self.max_bytes)
        check_base(self.model, where, None, self._base)
        return read_content(where, self.targets, self.dtype, self.device.type == "cuda", self.max_rank)

    def _refill(self, content: Content) -> None:
        """Read a content's factors from disk again, where one of its names has files that are still the same."""
        with self._lock:
            paths = dict.fromkeys([content.path, *self._paths_of(content)])
        for last, path in enumerate(paths, 1 - len(paths)):
            try:
                host, stored = self._read_again(content, path)
                break
            except VeneerError:
                if not last:
                    raise
        with self._lock:
            content.host, content.stored, content.loading = host, stored, None
            content.path = path

    def _read_again(self, content: Content, path: Path) -> tuple[Tensor, Stored | None]:
        """A content's `host` and `stored` from a directory. Raises `AdapterRefused` for files that are not the same."""
        try:
            check_files(path, self.allowed, self.max_bytes)
            host = read_again(content, self.dtype) if path == content.path else None
            if host is not None:
                return host, content.stored
            again = read_content(path, self.targets, self.dtype, not content.turned, self.max_rank)
        except OSError as error:
            raise AdapterRefused(f"the adapter's files cannot be read: {error.strerror}") from None
        if again.hash != content.hash:
            raise AdapterRefused("the adapter's files have changed on disk since it was loaded: load it again")
        return again.host, again.stored

    def _forget(self, content: Content) -> None:
        """A name points here no more; if others do, their files and pins are those that count."""
        paths = self._paths_of(content)
        content.named, content.pinned = bool(paths), self._pinned(content)
        if paths and content.path not in paths:
            content.path, content.stored = paths[0], None
        self._drop_unused(content)

    def _drop_unused(self, content: Content) -> None:
        if not content.named and not content.users:
            content.host = None
            if not content.on_device:
                self._contents.discard(content)
        if content.loading is not None and content.loading.done() and not content.users:
            content.loading = None  # a failed reading may be tried again

    def _trim(self) -> None:
        """Keep `host_slots` contents in host memory."""
        held = [c for c in self._contents if c.host is not None]
        spare = sorted((c for c in held if not (c.pinned or c.users)), key=lambda c: c.used)
        for content in spare[: max(0, len(held) - self.host_slots)]:
            content.host = None

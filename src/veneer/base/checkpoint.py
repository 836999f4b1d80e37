"""A safetensors checkpoint as files: found, mapped into memory without being read, and written piece by piece.

A safetensors file is the header's length (8 bytes, little-endian), the header (JSON: name → dtype, shape, offsets) and the
tensors' bytes in C order. The safetensors library reads it and has no writer that takes a tensor in pieces.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.base.load import locate
from veneer.errors import BaseModelError, RunError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
CHUNK = 1 << 24
"""Bytes copied at once."""
FLUSH = 1 << 27
"""Bytes after which the disk is told to write what has come so far."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype by the format's code, its shape, and where its bytes stand in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file mapped into memory: its tensors are views that the system reads when they are touched.

    Raises `BaseModelError` for a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt"):
                pass  # the library checks sizes, offsets and overlaps
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
        except (SafetensorError, OSError, ValueError) as error:
            raise BaseModelError(f"{path} is damaged or cut short ({error}): download it again") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        found = {
            name: Entry(e["dtype"], tuple(e["shape"]), *(8 + size + at for at in e["data_offsets"]))
            for name, e in header.items()
        }
        self.entries = dict(sorted(found.items(), key=lambda item: item[1].start))

    @property
    def descriptor(self) -> int:
        """The open file, for reading at a place."""
        return self._file

    def tensor(self, name: str) -> Tensor:
        """A tensor as a read-only view of the file."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise BaseModelError(f"{self.path}: {name} is stored as {entry.dtype}, which Veneer does not read")
        dtype = DTYPES[entry.dtype]
        count = torch.Size(entry.shape).numel()
        if not count:
            return torch.empty(entry.shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the buffer is read-only: nothing writes to a frozen base
            if entry.start % dtype.itemsize:
                raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * dtype.itemsize, offset=entry.start)
                return raw.clone().view(dtype).view(entry.shape)
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def copy_to(self, file: Any, name: str) -> int:
        """Append a tensor's bytes to an open file, within the system where it can do that; return how many."""
        entry = self.entries[name]
        at = entry.start
        while at < entry.stop:
            count = min(CHUNK, entry.stop - at)
            try:
                done = os.copy_file_range(self._file, file.fileno(), count, at)
            except (AttributeError, OSError):
                done = 0
            if not done:  # not on this system, or not between these two file systems
                done = file.write(memoryview(self._map)[at : at + count])
                self.release(at, at + done)
            at += done
        return entry.stop - entry.start

    def release(self, start: int, stop: int) -> None:
        """Let the pages between two places of the file go from this process's memory; they stay in the file's cache."""
        if hasattr(self._map, "madvise"):
            start = start // mmap.PAGESIZE * mmap.PAGESIZE
            if stop > start:
                self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory's safetensors files, in the index's order, and which of them holds each tensor."""

    folder: Path
    files: dict[str, TensorFile]
    where: dict[str, str]
    index: dict[str, Any] | None

    def tensor(self, name: str) -> Tensor:
        """A tensor as a read-only view of its file."""
        return self.files[self.where[name]].tensor(name)

    def entry(self, name: str) -> Entry:
        """A tensor's dtype and shape."""
        return self.files[self.where[name]].entries[name]

    def forget(self) -> None:
        """Let go of all that was read so far."""
        for file in self.files.values():
            file.release(0, max((entry.stop for entry in file.entries.values()), default=0))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.stop - e.start for file in self.files.values() for e in file.entries.values())


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path | None:
    """The directory of a base's safetensors files (downloaded from the hub if need be); None if it has none (GGUF)."""
    source = locate(str(name), revision)
    if "gguf_file" in source.options:
        return None
    folder = Path(source.where)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*"]
        options = {"revision": revision, "local_files_only": bool(source.options.get("local_files_only"))}
        folder = Path(snapshot_download(source.where, allow_patterns=kinds, **options))
    return folder if (folder / INDEX).exists() or (folder / SINGLE).exists() else None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Map a directory's files. Raises `BaseModelError` where one is missing or damaged."""
    if not (folder / INDEX).exists():
        file = TensorFile(folder / SINGLE)
        return Checkpoint(folder, {SINGLE: file}, dict.fromkeys(file.entries, SINGLE), None)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        where = dict(index["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"{folder / INDEX} is damaged: {error!r}") from None
    files = {name: TensorFile(folder / name) for name in dict.fromkeys(where.values())}
    lost = next((name for name, file in where.items() if name not in files[file].entries), None)
    if lost:
        raise BaseModelError(f"{folder / where[lost]} holds no {lost}, which the index names: download it again")
    return Checkpoint(folder, files, where | {n: f for f in files for n in files[f].entries if n not in where}, index)


def header_of(entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The head of a safetensors file of tensors (dtype code, shape) one after the other: length and JSON, 8-aligned."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (code, shape) in entries.items():
        stop = at + torch.Size(shape).numel() * DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: Path,
    entries: dict[str, tuple[str, tuple[int, ...]]],
    metadata: dict[str, str],
    pieces: Callable[[str], Iterable[Any]],
) -> None:
    """Write a safetensors file, each tensor from the pieces that `pieces(name)` gives in order.

    A piece is bytes-like, or a function that writes to the file it is given and returns how many bytes.

    In one atomic step: the file has its name only once all is on the disk. Raises `RunError` (disk).
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with ThreadPoolExecutor(1) as flusher, temporary.open("wb", buffering=0) as file:
            head = header_of(entries, metadata)
            flushed, flush = _write_all(file, head), None
            for name, (code, shape) in entries.items():
                count = 0
                for piece in pieces(name):
                    count += _write_all(file, piece)
                    if file.tell() - flushed > FLUSH and (flush is None or flush.done()):  # the disk works meanwhile
                        flushed, flush = file.tell(), flusher.submit(os.fsync, file.fileno())
                wanted = torch.Size(shape).numel() * DTYPES[code].itemsize
                if count != wanted:
                    raise AssertionError(f"{name}: {count} bytes, not {wanted}")
            flusher.submit(os.fsync, file.fileno()).result()
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def _write_all(file: Any, piece: Any) -> int:
    """Write a piece, however little the system takes at once."""
    if callable(piece):
        return piece(file)
    view = memoryview(piece).cast("B") if not isinstance(piece, bytes) else memoryview(piece)
    at = 0
    while at < len(view):
        at += file.write(view[at:])
    return at

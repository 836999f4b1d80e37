"""An adapter's factors in its files: which bytes they are, and reading them again without hashing them again.

What is served is what its name promises, for the bytes come from the very files whose whole content was hashed: the
same device, inode, size, time of writing and time of change of both `adapter_config.json` and the tensors, looked at
before and (through the open file) after reading, and once, when they are loaded, their bytes are compared with those
that were hashed. No program can set a file's time of change. Files that had changed less than `STILL` seconds before
they began to be read for hashing are not trusted, since a second change in the same tick of the file system's clock
could not be seen: they are hashed again, as are files that differ in any of this. Not noticed is what happens behind
these times: a clock that is set back or, on a file server, behind by more than `STILL`; bytes that rot on the medium;
and writes through a shared memory mapping, for which a system may set them late (or, in tmpfs, never).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time

import torch
from torch import Tensor

from veneer.formats.peft import CONFIG, TENSORS
from veneer.formats.peft_tensors import PREFIX

STILL = 2.0
"""Seconds: the coarsest clock of a file system in use."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MOST_PARTS = 512
"""Buffers of one read; the system takes 1,024."""

Stamp = tuple[int, int, int, int, int]


def stamp_of(status: os.stat_result) -> Stamp:
    """What tells a file from another, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def stamps_of(path: Path) -> tuple[Stamp, Stamp] | None:
    """Of an adapter's configuration and of its tensors, before they are read; None where later ones could be the same."""
    if os.name != "posix":
        return None  # elsewhere the time of change is that of creation
    try:
        stamps = stamp_of(os.stat(path / CONFIG)), stamp_of(os.stat(path / TENSORS))
    except OSError:
        return None
    changed = max(time_ns for *_, mtime, ctime in stamps for time_ns in (mtime, ctime))
    return stamps if time() - changed / 1e9 >= STILL else None


@dataclass(frozen=True)
class Stored:
    """Where factors lie: each target's lora_A and lora_B, in the order of the packed tensor, at `offsets` (bytes)."""

    stamps: tuple[Stamp, Stamp]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def find(cls, path: Path, stamps: tuple[Stamp, Stamp], targets: Sequence[str], flat: Tensor) -> Stored | None:
        """Where the factors `flat` of `targets`, A after B, lie in files with the `stamps`; None where they do not.

        `flat` is what was hashed. The stamps alone would not do: between two looks, a link may have led elsewhere.
        """
        try:
            with open(path / TENSORS, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            found = [_entry(header, f"{target}.lora_{leaf}.weight") for target in targets for leaf in "AB"]
            if not all(entry and DTYPES.get(entry["dtype"]) == flat.dtype for entry in found):
                return None
            spans = [entry["data_offsets"] for entry in found]
            offsets, sizes = tuple(8 + length + start for start, _ in spans), tuple(end - start for start, end in spans)
            stored, again = cls(stamps, flat.dtype, offsets, sizes), torch.empty_like(flat)
            same = sum(sizes) == flat.nbytes and stored.read(path, again)
        except (OSError, ValueError, KeyError):  # they are gone, or others
            return None
        return stored if same and torch.equal(again.view(torch.uint8), flat.view(torch.uint8)) else None

    def read(self, path: Path, flat: Tensor) -> bool:
        """Fill `flat`, in this dtype, with the factors as they are stored; False if the files are not the same."""
        with open(path / TENSORS, "rb", buffering=0) as file:
            if (stamp_of(os.stat(path / CONFIG)), stamp_of(os.fstat(file.fileno()))) != self.stamps:
                return False
            whole = memoryview(flat.view(torch.uint8).numpy())
            for offset, parts in self._runs(whole):
                _read_into(file.fileno(), offset, parts)
            return stamp_of(os.fstat(file.fileno())) == self.stamps[1]

    def _runs(self, whole: memoryview) -> list[tuple[int, list[memoryview]]]:
        """(offset, buffers) of each stretch of the file that lies in one piece."""
        at, views = 0, []
        for offset, size in zip(self.offsets, self.sizes):
            views.append((offset, whole[at : at + size]))
            at += size
        runs: list[tuple[int, list[memoryview]]] = []
        end = -1
        for offset, view in sorted(views, key=lambda one: one[0]):
            if offset != end or len(runs[-1][1]) == MOST_PARTS:
                runs.append((offset, []))
            runs[-1][1].append(view)
            end = offset + len(view)
        return runs


def _entry(header: Mapping[str, dict], key: str) -> dict | None:
    return header.get(PREFIX + key) or header.get(key)


def _read_into(file: int, offset: int, parts: list[memoryview]) -> None:
    """Fill all buffers from one stretch of a file. Raises `OSError` where it ends too early."""
    while parts:
        count = os.preadv(file, parts, offset)
        if not count:
            raise OSError(None, "the file has become shorter")
        offset += count
        while parts and count >= len(parts[0]):
            count -= len(parts.pop(0))
        if count:
            parts[0] = parts[0][count:]

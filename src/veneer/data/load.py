"""From sources to examples, counting what is read and what is skipped."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from veneer.data.example import Example
from veneer.data.hub import hub_fingerprint
from veneer.data.messages import FORMATS, detect_format, to_example, unknown_format
from veneer.data.readers import BUNDLED, iter_rows, local_path, parts
from veneer.data.rows import Row, RowError
from veneer.errors import DataError

Sources = str | Path | Sequence[str | Path]
SHOWN_SKIPS = 5
BLOCK_BYTES = 1 << 20


class ExampleReader:
    """The examples of some sources; each `iter` starts again and sets the counts back.

    `read` and `skipped` count rows so far, `skip_reasons` the skipped ones by reason, `skipped_where` has the first few
    messages. `formats` maps each file read so far to its format, `format` names them in one string.
    """

    def __init__(self, sources: Sources, format: str, on_bad_row: str, split: str, limit: int | None) -> None:
        self._parts = [part for source in _as_list(sources) for part in parts(source)]
        self._format = format
        self._on_bad_row = on_bad_row
        self._split = split
        self._limit = limit
        self._reset()

    def _reset(self) -> None:
        self.read = 0
        self.skipped = 0
        self.skip_reasons: dict[str, int] = Counter()
        self.skipped_where: list[str] = []
        self.formats: dict[str, str] = {}

    @property
    def format(self) -> str:
        return ", ".join(dict.fromkeys(self.formats.values()))

    def __iter__(self) -> Iterator[Example]:
        self._reset()
        for part in self._parts:
            for row in iter_rows(part, split=self._split):
                try:
                    example = self._convert(row, str(part))
                except RowError as error:
                    self._skip(error)
                    continue
                self.read += 1
                yield example
                if self.read == self._limit:
                    return
        if not self.read:
            raise DataError(f"no usable row: all {self.skipped} were skipped; the first: {self.skipped_where[0]}")

    def _convert(self, row: Row | RowError, part: str) -> Example:
        if isinstance(row, RowError):
            raise row
        format = detect_format(row.values) if self._format == "auto" else self._format
        if format is None:
            raise unknown_format(row)
        example = to_example(row, format)
        if (expected := self.formats.get(part, format)) != format:
            detail = f": {format}, not {expected}; put each format in a file of its own"
            raise RowError(row.where, "another format than the rows before", detail)
        self.formats[part] = format
        return example

    def _skip(self, error: RowError) -> None:
        if self._on_bad_row == "error":
            raise error
        self.skipped += 1
        self.skip_reasons[error.reason] += 1
        if len(self.skipped_where) < SHOWN_SKIPS:
            self.skipped_where.append(str(error))


def read_examples(
    sources: Sources,
    *,
    format: str = "auto",
    on_bad_row: Literal["error", "skip"] = "error",
    split: str = "train",
    limit: int | None = None,
) -> ExampleReader:
    """Read examples from files, folders, "bundled" or hub data sets.

    "auto" takes each file's format from its first good row. A missing source raises now, bad data when it is read.
    Files that cannot be read at all raise even with ``on_bad_row="skip"``.
    """
    if format not in ("auto", *FORMATS):
        raise DataError(f"unknown data format {format!r}; choose auto or one of {', '.join(FORMATS)}")
    if on_bad_row not in ("error", "skip"):
        raise DataError(f"unknown on_bad_row {on_bad_row!r}; choose error or skip")
    return ExampleReader(sources, format, on_bad_row, split, limit)


def content_hash(sources: Sources, *, split: str = "train") -> str:
    """SHA-256 over the names and bytes of the sources' files, wherever they lie; a hub data set's fingerprint."""
    total = hashlib.sha256()
    for source in _as_list(sources):
        for part in parts(source):
            if isinstance(part, str) and part not in BUNDLED:
                name, digest = f"{part}[{split}]", hub_fingerprint(part, split)
            else:
                path = local_path(part)
                folder = Path(source).expanduser()
                name = path.relative_to(folder).as_posix() if folder.is_dir() and path != folder else path.name
                digest = _file_hash(path)
            total.update(f"{name}\0{digest}\0".encode())
    return total.hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def _as_list(sources: Sources) -> list[str | Path]:
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    if not listed:
        raise DataError("no data source given; name a file, a folder, a hub data set or 'bundled'")
    return listed

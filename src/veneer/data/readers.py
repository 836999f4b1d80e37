"""Read rows from files, folders, the bundled data and hub data sets, as streams.

JSONL, CSV, TSV, Parquet and text are read piece by piece; a JSON array is loaded whole. Text (.txt, .md) gives one
row {"text": …} per paragraph: the lines between blank lines. CSV and TSV have a header line, and a messages column
holds JSON. Names that start with a dot, READMEs and licences inside a folder are not data.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from veneer.data.hub import iter_hub, looks_like_hub
from veneer.data.messages import TURN_LISTS, detect_format
from veneer.data.rows import Row, RowError, kind
from veneer.errors import DataError

BATCH_ROWS = 256
BUFFER_BYTES = 1 << 20
BUNDLED = {"bundled": "train", "bundled:heldout": "heldout"}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".7z", ".tar")
NOT_UTF8 = "not valid UTF-8"

RowOrError = Row | RowError


def read_rows(source: str | Path, *, split: str = "train") -> Iterator[Row]:
    """Rows of a file, a folder, "bundled", "bundled:heldout" or a hub data set. Raises `DataError` at a bad row."""
    for row in itertools.chain.from_iterable(iter_rows(part, split=split) for part in parts(source)):
        if isinstance(row, RowError):
            raise row
        yield row


def parts(source: str | Path) -> list[str | Path]:
    """What a source consists of: a folder's files, sorted by path; itself otherwise. Raises if it does not exist."""
    if isinstance(source, str) and source in BUNDLED:
        return [source]
    path = Path(source).expanduser()
    if path.is_dir():
        return list(_folder_files(path))
    if path.is_file():
        _reader_of(path)
        return [path]
    is_hub = isinstance(source, str) and looks_like_hub(source) and path.suffix.lower() not in READERS
    if is_hub and not _near_names(path):
        return [source]
    raise _missing(path)


def iter_rows(part: str | Path, *, split: str = "train") -> Iterator[RowOrError]:
    """Rows of one of `parts`, with an error object in the place of each bad row. An unreadable file raises."""
    if isinstance(part, str) and part not in BUNDLED:
        rows: Iterator[RowOrError] = iter_hub(part, split)
    else:
        path = local_path(part)
        rows = _reader_of(path)(path, str(part), split)
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{part}: cannot be read: {error.strerror or error}") from None
    if empty:
        raise DataError(f"{part}: holds no rows; check that it was written completely, or leave it out")


def local_path(part: str | Path) -> Path:
    """The file of a part that is not on the hub."""
    if isinstance(part, Path):
        return part
    from veneer.data.bundled import bundled_path

    return Path(bundled_path(BUNDLED[part]))


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(path.relative_to(folder)))
    if not files:
        raise DataError(f"{folder}: no data files in this folder; known are {', '.join(READERS)}")
    return files


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in READERS and not hidden and not path.name.upper().startswith(("README", "LICENSE"))


def _reader_of(path: Path) -> Callable[[Path, str, str], Iterator[RowOrError]]:
    reader = READERS.get(path.suffix.lower())
    if path.suffix.lower() in PACKED:
        raise DataError(f"{path}: compressed data are not read; unpack the file first")
    if reader is None:
        found = f"unknown file type {path.suffix!r}" if path.suffix else "a file without an extension"
        raise DataError(f"{path}: {found}; rename or convert it to one of {', '.join(READERS)}")
    return reader


def _near_names(path: Path) -> list[str]:
    if not path.parent.is_dir():
        return []
    return difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=3)


def _missing(path: Path) -> DataError:
    if path.exists():
        return DataError(f"{path}: not a file or folder")
    if not path.parent.is_dir():
        return DataError(f"{path}: no such file: the folder {path.parent} does not exist")
    near = _near_names(path)
    hint = f"did you mean {' or '.join(near)}?" if near else "check the name (a hub data set is written owner/name)"
    return DataError(f"{path}: no such file; {hint}")


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends, without a byte order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number == 0:
                if line.startswith(UTF16):
                    raise DataError(f"{path}: text in UTF-16; save it as UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
            yield line


def _parse(text: bytes, where: str) -> Row | RowError:
    try:
        values = json.loads(text.decode())
    except UnicodeDecodeError:
        return RowError(where, NOT_UTF8, "; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RowError(
            where, "broken JSON", f": {error.msg} (column {error.colno}); put one whole object on each line"
        )
    except (ValueError, RecursionError) as error:
        return RowError(where, "broken JSON", f": {error}")
    return _row(values, where)


def _row(values: Any, where: str) -> Row | RowError:
    if isinstance(values, dict):
        return Row(values, where)
    return RowError(where, f"the row is {kind(values)}, not an object", '; write {"messages": […]} or the like')


def _read_jsonl(path: Path, label: str, split: str) -> Iterator[RowOrError]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _parse(line, f"{label}:{number}")


def _read_json(path: Path, label: str, split: str) -> Iterator[RowOrError]:
    head = list(itertools.islice((line for line in _lines(path) if line.strip()), 2))
    if len(head) == 2 and isinstance(_parse(head[0], label), Row):
        yield from _read_jsonl(path, label, split)
        return
    if not head:
        return
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        content = json.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{label}:{line}: {NOT_UTF8}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{label}:{error.lineno}: broken JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{label}: broken JSON: {error}") from None
    for number, values in enumerate(_items(content, label, split), 1):
        yield _row(values, f"{label}: item {number}")


def _items(content: Any, label: str, split: str) -> list[Any]:
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise DataError(f"{label}: holds {kind(content)}; expected a list of objects")
    if detect_format(content):
        return [content]
    lists = [key for key, value in content.items() if isinstance(value, list)]
    if split in lists:
        return content[split]
    if len(lists) == 1:
        return content[lists[0]]
    found = f"{len(lists)} lists ({', '.join(lists)})" if lists else "no list of rows"
    raise DataError(f"{label}: the object holds {found}; write one list of objects")


def _read_csv(path: Path, label: str, split: str) -> Iterator[RowOrError]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 KiB refuses long texts
    lines = (line.decode(errors="surrogateescape") for line in _lines(path))
    first = next(lines, "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        where = f"{label}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RowError(where, "broken CSV", f": {error}; check the quotes of the row that starts here")
            continue
        if not cells:
            continue
        if not header:
            header = _header(cells, where)
        elif len(cells) != len(header):
            yield RowError(where, "wrong number of fields", f": {len(cells)}, and the header has {len(header)}")
        else:
            yield _csv_row(dict(zip(header, cells, strict=True)), where)


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{where}: the header names {', '.join(map(repr, twice))} twice; rename a column")
    return names


def _csv_row(values: dict[str, Any], where: str) -> Row | RowError:
    try:
        "".join(values.values()).encode()
    except UnicodeEncodeError:
        return RowError(where, NOT_UTF8, "; save the file as UTF-8")
    for key in TURN_LISTS:
        if values.get(key, "").lstrip().startswith("["):
            try:
                values[key] = json.loads(values[key])
            except (ValueError, RecursionError) as error:
                return RowError(where, "broken JSON", f" in column {key!r}: {error}")
    return Row(values, where)


def _read_parquet(path: Path, label: str, split: str) -> Iterator[RowOrError]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Without these two a whole row group is held: 265 MiB instead of 31 for one of 230 MiB.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
            batches = file.iter_batches(batch_size=BATCH_ROWS)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, values in enumerate(rows, 1):
                yield Row(values, f"{label}: row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{label}: not a readable Parquet file: {reason}; write or download it again") from None


def _read_text(path: Path, label: str, split: str) -> Iterator[RowOrError]:
    numbered = enumerate(_lines(path), 1)
    for blank, group in itertools.groupby(numbered, key=lambda item: not item[1].strip()):
        if blank:
            continue
        lines = list(group)
        where = f"{label}:{lines[0][0]}"
        try:
            text = b"".join(line for _, line in lines).decode()
        except UnicodeDecodeError:
            yield RowError(where, NOT_UTF8, "; save the file as UTF-8")
        else:
            yield Row({"text": text.replace("\r\n", "\n").rstrip("\n")}, where)


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}

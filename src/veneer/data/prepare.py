"""Tokenise a data set once: in shards that are written whole, found again by content, and mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from veneer.data.example import Example, TokenizedExample
from veneer.data.mask import double_bos, fit_length, tokenize_batch
from veneer.data.template import render
from veneer.errors import ConfigError, DataError
from veneer.files import write_text

FORMAT = 1
SHARD = 4096
BATCH = 512


@dataclass
class Counts:
    """What became of the examples read: `examples` are trained on, `skipped` were bad rows, `longest` is in tokens."""

    read: int = 0
    skipped: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    split: int = 0
    end_of_turn_untrained: int = 0
    double_bos: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, number: int = 1) -> None:
        """Count examples that are left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + number

    def add(self, other: Counts) -> None:
        """Add another shard's counts."""
        for name, value in asdict(other).items():
            if name == "dropped":
                for reason, number in value.items():
                    self.drop(reason, number)
            elif name == "longest":
                self.longest = max(self.longest, value)
            else:
                setattr(self, name, getattr(self, name) + value)


class PreparedData(Sequence):
    """Tokenised examples. `key` identifies content, tokenizer, template and options together."""

    def __init__(self, shards: list[tuple[np.ndarray, np.ndarray, np.ndarray]], counts: Counts, key: str) -> None:
        self._shards, self.counts, self.key = shards, counts, key
        self._ends = np.cumsum([len(offsets) - 1 for _, _, offsets in shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> TokenizedExample:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        shard = int(np.searchsorted(self._ends, i, side="right"))
        ids, supervised, offsets = self._shards[shard]
        local = i - (int(self._ends[shard - 1]) if shard else 0)
        part = slice(int(offsets[local]), int(offsets[local + 1]))
        return TokenizedExample(ids[part], supervised[part])


def prepare(
    examples: Iterable[Example],
    tokenizer: Any,
    *,
    content_hash: str | None = None,
    cache_dir: Path | None = None,
    train_on: str = "assistant",
    max_length: int = 2048,
    on_long: str = "truncate",
    progress: Callable[[int], None] | None = None,
) -> PreparedData:
    """Tokenise and mask `examples`. With a `cache_dir` the result is kept there under `content_hash`, their content's.

    A finished preparation is read back without tokenising; an interrupted one goes on at its next shard. Raises
    `TemplateError` (an example that cannot be masked exactly) and `DataError` (nothing supervised at all).
    """
    if cache_dir and not content_hash:
        raise ConfigError("cache_dir needs content_hash: what would tell one data set from another there")
    key = cache_key(tokenizer, content_hash or uuid.uuid4().hex, train_on, max_length, on_long)
    folder = cache_dir / key if cache_dir else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    shards, total, stream, n = [], Counts(), None, 0
    done = _finished(folder)
    finished = done["shards"] if done else None
    while finished is None or n < finished:
        shard = _read_shard(folder, n) if stream is None else None
        if shard is None:
            if finished is not None:  # a damaged shard of a finished preparation: begin again from what is sound
                finished = None
            if stream is None:
                stream = islice(iter(examples), n * SHARD, None)
            shard = _make_shard(list(islice(stream, SHARD)), tokenizer, train_on, max_length, on_long)
            if shard is None:
                break
            _write_shard(folder, n, shard)
        arrays, counts = shard
        shards.append(arrays)
        total.add(counts)
        n += 1
        if progress:
            progress(total.read)
        if finished is None and counts.read < SHARD:
            break
    if total.supervised_tokens == 0:
        why = "; ".join(f"{number} {reason}" for reason, number in total.dropped.items()) or "no examples"
        cut = any(reason.endswith("max_length") for reason in total.dropped)
        fix = f"raise max_length, which is {max_length}" if cut else "there is nothing to learn from"
        raise DataError(f"no supervised token in {total.read} examples ({why}): {fix}")
    total.skipped = done["skipped"] if done and stream is None else getattr(examples, "skipped", 0)
    if folder:
        write_text(folder / "done.json", json.dumps({"shards": n, "skipped": total.skipped}) + "\n")
    return PreparedData(shards, total, key)


def cache_key(tokenizer: Any, content_hash: str, *options: Any) -> str:
    """A hash over content, tokenizer, template and options."""
    parts = [FORMAT, content_hash, str(tokenizer.chat_template), tokenizer.eos_token, tokenizer.bos_token, *options]
    digest = hashlib.sha256(json.dumps(parts, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode() if tokenizer.is_fast else repr(tokenizer).encode())
    return digest.hexdigest()[:32]


Shard = tuple[tuple[np.ndarray, np.ndarray, np.ndarray], Counts]


def _make_shard(examples: list[Example], tokenizer: Any, train_on: str, max_length: int, on_long: str) -> Shard | None:
    if not examples:
        return None
    counts, kept = Counts(read=len(examples)), []
    for start in range(0, len(examples), BATCH):
        rendered = [render(e, tokenizer, train_on=train_on) for e in examples[start : start + BATCH]]
        for chat in (True, False):
            part = [r for r in rendered if r.chat == chat]
            for r, tokens in zip(part, tokenize_batch(part, tokenizer) if part else []):
                counts.double_bos += double_bos(tokens, tokenizer)
                counts.end_of_turn_untrained += train_on != "all" and any(not s.end_of_turn for s in r.spans)
                kept += _fit(tokens, max_length, on_long, counts)
    lengths = [len(e.input_ids) for e in kept]
    counts.examples, counts.tokens, counts.longest = len(kept), sum(lengths), max(lengths, default=0)
    counts.supervised_tokens = sum(int(e.supervised[1:].sum()) for e in kept)
    ids = np.concatenate([e.input_ids for e in kept]) if kept else np.zeros(0, np.int32)
    supervised = np.concatenate([e.supervised for e in kept]) if kept else np.zeros(0, bool)
    return (ids, supervised, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)), counts


def _fit(tokens: TokenizedExample, max_length: int, on_long: str, counts: Counts) -> list[TokenizedExample]:
    if not tokens.supervised[1:].any():
        counts.drop("no supervised token")
        return []
    pieces = fit_length(tokens, max_length, on_long)
    if not pieces:
        counts.drop("longer than max_length")
        return []
    sound = [p for p in pieces if p.supervised[1:].any()]
    if not sound:
        counts.drop("no supervised token within max_length")
        return []
    if len(tokens.input_ids) > max_length:
        counts.truncated += on_long == "truncate"
        counts.split += on_long == "split"
        if len(sound) < len(pieces):
            counts.drop("pieces of split examples without a supervised token", len(pieces) - len(sound))
    return sound


def _shard_path(folder: Path, n: int) -> Path:
    return folder / f"shard-{n:06d}.safetensors"


def _write_shard(folder: Path | None, n: int, shard: Shard) -> None:
    if folder is None:
        return
    (ids, supervised, offsets), counts = shard
    path = _shard_path(folder, n)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(
            {"ids": ids, "supervised": supervised, "offsets": offsets},
            temporary,
            metadata={"counts": json.dumps(asdict(counts))},
        )
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot keep tokenised data in {folder}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _read_shard(folder: Path | None, n: int) -> Shard | None:
    if folder is None or not _shard_path(folder, n).exists():
        return None
    try:
        with safe_open(_shard_path(folder, n), "np") as data:
            arrays = tuple(data.get_tensor(name) for name in ("ids", "supervised", "offsets"))
            counts = Counts(**json.loads(data.metadata()["counts"]))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        return None
    return arrays, counts


def _finished(folder: Path | None) -> dict[str, int] | None:
    try:
        done = json.loads((folder / "done.json").read_text()) if folder else None
    except (OSError, ValueError):
        return None
    return done if isinstance(done, dict) and {"shards", "skipped"} <= done.keys() else None

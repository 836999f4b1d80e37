"""The training and the held-out part of what a configuration names, the same for training and for scoring."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from veneer.config import DataConfig
from veneer.data.example import Example
from veneer.data.load import ExampleReader, content_hash, read_examples
from veneer.errors import ConfigError, DataError


@dataclass
class Part(Iterable[Example]):
    """Some examples of a reader: those whose number `keep` holds (all if None). `identity` names their content."""

    reader: ExampleReader
    identity: str
    keep: np.ndarray | None = None

    def __iter__(self) -> Iterator[Example]:
        for number, example in enumerate(self.reader):
            if self.keep is None or self.keep[number]:
                yield example

    @property
    def skipped(self) -> int:
        """Bad rows that the last reading left out."""
        return self.reader.skipped


def part_of(config: DataConfig, part: str, seed: int) -> Part:
    """The "train" or "heldout" part. Without `heldout`, a seeded choice of `heldout_fraction` of the training data.

    Raises `ConfigError` where there is no held-out part and `DataError` where the fraction leaves nothing to train on.
    """
    own = part == "heldout" and config.heldout is not None
    if part == "heldout" and not own and not config.heldout_fraction:
        raise ConfigError("there is no held-out data: set data.heldout or data.heldout_fraction")
    sources = config.heldout if own else config.train
    reader = read_examples(
        sources, format=config.format, on_bad_row=config.on_bad_row, split=config.split, limit=config.limit
    )
    identity = f"{content_hash(sources, split=config.split)} {config.format} {config.on_bad_row} {config.limit}"
    if own or config.heldout is not None or not config.heldout_fraction:
        return Part(reader, identity)
    held = held_out(sum(1 for _ in reader), config.heldout_fraction, seed)
    keep = held if part == "heldout" else ~held
    return Part(reader, f"{identity} {part} {config.heldout_fraction} {seed}", keep)


def held_out(count: int, fraction: float, seed: int) -> np.ndarray:
    """Which of `count` examples are held out (bool, length count): a seeded choice of the rounded share, at least one."""
    cut = max(1, round(count * fraction))
    if cut >= count:
        raise DataError(f"data.heldout_fraction {fraction} leaves none of {count} examples to train on")
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng([seed, 1 << 20]).permutation(count)[:cut]] = True
    return chosen

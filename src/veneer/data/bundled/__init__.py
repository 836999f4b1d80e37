"""Data that comes with Veneer."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import DataError

SPLITS = ("train", "heldout")


def bundled_path(split: str) -> Path:
    """The JSONL file of the bundled task, split "train" or "heldout"."""
    if split not in SPLITS:
        raise DataError(f"the bundled data has no split {split!r}: use {' or '.join(SPLITS)}")
    return Path(__file__).parent / "messages_to_json" / f"{split}.jsonl"

"""Data sets of the Hugging Face hub, through `datasets`; a hub out of reach is an error in seconds."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterator
from typing import Any

from veneer.data.rows import Row
from veneer.errors import DataError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
REQUEST_SECONDS = 5
ANSWER_SECONDS = 8  # a request's timeout does not cover name resolution


def looks_like_hub(source: str) -> bool:
    """Whether a source has the form owner/name or owner/name:configuration."""
    return HUB_NAME.fullmatch(source) is not None


def iter_hub(source: str, split: str) -> Iterator[Row]:
    """The rows of one split."""
    for number, values in enumerate(load_hub(source, split), 1):
        yield Row(dict(values), f"{source}[{split}]: row {number}")


def hub_fingerprint(source: str, split: str) -> str:
    """What `datasets` derives from the data set's revision, configuration and split."""
    return load_hub(source, split)._fingerprint


def load_hub(source: str, split: str) -> Any:
    """The data set `owner/name[:configuration]` as a `datasets.Dataset`, memory-mapped from the cache."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: reading a hub data set needs `pip install veneer[hub]`") from None
    name, _, configuration = source.partition(":")
    check_reachable(name)
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # whatever the data set's files provoke
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{source}[{split}]: the hub data set cannot be read: {reason}") from None


def check_reachable(name: str) -> None:
    """Ask the hub for a data set and raise `DataError` if there is no good answer; silent in offline mode."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=REQUEST_SECONDS)
            answers.put(None)
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        error = TimeoutError()
    if error is None:
        return
    if isinstance(error, GatedRepoError):
        raise DataError(f"{name}: this hub data set needs permission; ask for it on its page, then `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        raise DataError(f"{name}: neither a file here nor a hub data set (a private one needs `hf auth login`)")
    if isinstance(error, HfHubHTTPError):
        raise DataError(f"{name}: the hub refused: {' '.join(str(error).split())}; try again later")
    raise DataError(
        f"{name}: no such file here, and the hub cannot be reached; give a local file, "
        "or set HF_HUB_OFFLINE=1 to use a data set that is already in the cache"
    )

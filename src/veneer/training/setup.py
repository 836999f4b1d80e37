"""What a run needs before its first step: base, data, order of examples, directory, provenance."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from veneer.adapter.attach import attach
from veneer.adapter.bank import Bank
from veneer.adapter.init import DATA_DRIVEN
from veneer.adapter.vocabulary import add_tokens
from veneer.base.fingerprint import Fingerprint, mismatch
from veneer.base.load import load_base
from veneer.base.original import float_weights
from veneer.base.paths import cache_dir
from veneer.base.stream_load import load_streamed
from veneer.config import OptimConfig, TrainConfig
from veneer.data.example import TokenizedExample
from veneer.data.parts import part_of
from veneer.data.prepare import Counts, PreparedData, prepare
from veneer.errors import ConfigError, DataError, RunError
from veneer.files import LOCK
from veneer.formats.peft import base_record
from veneer.version import __version__

MOST_STEPS = 10**9
"""More than any run ends: a slip in `epochs`."""

MAY_CHANGE = {
    "out",
    "device",
    "train.stream",
    "train.resident_blocks",
    "train.vram",
    "train.save_every",
    "train.keep_checkpoints",
    "train.log_to",
}
"""Keys that a resumed run may set anew: they do not change its result."""


@dataclass
class Setup:
    """A loaded base and tokenised data. `heldout` is None where there is none."""

    model: torch.nn.Module
    tokenizer: Any
    train: Sequence[TokenizedExample]
    heldout: Sequence[TokenizedExample] | None
    train_key: str
    counts: dict[str, Counts]
    base: dict[str, Any]

    def steps_per_epoch(self, options: OptimConfig) -> int:
        """Optimiser steps in one pass; the last batch may be smaller."""
        return -(-len(self.train) // options.batch_size)

    def total_steps(self, options: OptimConfig) -> int:
        """Optimiser steps of the whole run, at least one. Raises `ConfigError` for more than any run can make."""
        steps = max(1, round(options.epochs * self.steps_per_epoch(options)))
        steps = min(steps, options.max_steps or steps)
        if steps > MOST_STEPS:
            raise ConfigError(
                f"train.epochs {options.epochs:g} and train.max_steps ask for {steps:.0e} steps: no run ends that"
            )
        return steps

    def batch(self, step: int, config: TrainConfig) -> list[int]:
        """Indices of the examples of step `step` (from 0): each epoch is a permutation that its number seeds."""
        per_epoch, size = self.steps_per_epoch(config.train), config.train.batch_size
        epoch, at = divmod(step, per_epoch)
        return self._order(epoch, config.seed)[at * size : (at + 1) * size]

    def _order(self, epoch: int, seed: int) -> list[int]:
        return np.random.default_rng([seed, epoch]).permutation(len(self.train)).tolist()

    def attach(self, config: TrainConfig, name: str = "default") -> Bank:
        """Put the run's adapter on the model, at its start."""
        options = config.adapter.model_copy(update={"adalora": None})  # the loop's, over a plain adapter
        return attach(
            self.model,
            options,
            name=name,
            seed=config.seed,
            calibration=self.calibration(config) if options.init in DATA_DRIVEN else None,
            float_weights=float_weights(self.model) if options.init == "loftq" else None,
            tokenizer=self.tokenizer,
        )

    def calibration(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The examples that training sees first, `init_options.examples` of them, each a batch for `model(**batch)`."""
        batches = []
        for index in self._order(0, config.seed)[: config.adapter.init_options.examples]:
            example = self.train[index]
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            labels = ids.masked_fill(~torch.from_numpy(example.supervised)[None], -100)
            batches.append({"input_ids": ids, "labels": labels, "use_cache": False})
        return batches

    def provenance(self, config: TrainConfig) -> dict[str, Any]:
        """What went into a run: versions, base, data and template hashes, seed."""
        template = self.tokenizer.chat_template or ""
        return {
            "veneer": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seed": config.seed,
            "base": self.base,
            "template_hash": hashlib.sha256(str(template).encode()).hexdigest(),
            "data": {
                "train": {
                    "hash": self.train_key,
                    "examples_used": len(self.train),
                    "counts": asdict(self.counts["train"]),
                },
                "heldout": {
                    "examples_used": len(self.heldout) if self.heldout else 0,
                    "counts": asdict(self.counts["heldout"]) if "heldout" in self.counts else None,
                },
            },
        }


def prepare_run(config: TrainConfig, note: Callable[[str], None]) -> Setup:
    """Load the base, read and tokenise the data, split off the held-out part."""
    model, tokenizer = open_base(config, note)
    return with_data(config, model, tokenizer, note)


def open_base(config: TrainConfig, note: Callable[[str], None]) -> tuple[torch.nn.Module, Any]:
    """The base and its tokenizer, with the tokens that the adapter adds."""
    options = {"dtype": config.dtype, "device": config.device, "quant": config.quant}
    options["chat_template"] = config.data.chat_template
    if config.train.stream == "off":
        model, tokenizer = load_base(config.model, **options)
    else:
        resident = 0 if config.train.resident_blocks == "auto" else config.train.resident_blocks
        model, tokenizer = load_streamed(config.model, where=config.train.stream, resident=resident, **options)
    if config.adapter.new_tokens:
        vocabulary = tokenizer.get_vocab()
        if known := [token for token in config.adapter.new_tokens if token in vocabulary]:
            names = ", ".join(map(repr, known))
            note(
                f"the tokenizer has {names} already: the vocabulary does not grow for them, and their rows are trained"
            )
        add_tokens(model, tokenizer, config.adapter.new_tokens)
    return model, tokenizer


def with_data(config: TrainConfig, model: torch.nn.Module, tokenizer: Any, note: Callable[[str], None]) -> Setup:
    """What `prepare_run` gives, on a base that is loaded: its data read, tokenised and checked."""
    train = load_data(config, "train", tokenizer, note)
    counts, heldout = {"train": train.counts}, None
    if config.data.heldout is not None or config.data.heldout_fraction:
        heldout = load_data(config, "heldout", tokenizer, note)
        counts["heldout"] = heldout.counts
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(c.longest for c in counts.values())
    if room and longest > room:
        raise DataError(
            f"the longest example has {longest} tokens and the model's context is {room}: set data.max_length to at "
            f"most {room}"
        )
    setup = Setup(model, tokenizer, train, heldout, train.key, counts, base_record(model))
    setup.total_steps(config.train)  # refuses what no run ends, before a file is written
    return setup


def load_data(config: TrainConfig, part: str, tokenizer: Any, note: Callable[[str], None]) -> PreparedData:
    """Read and tokenise the "train" or "heldout" part, saying what was found and what was left out."""
    options = config.data
    examples = part_of(config.data, part, config.seed)
    data = prepare(
        examples,
        tokenizer,
        content_hash=examples.identity,
        cache_dir=cache_dir() / "tokenized",
        train_on=options.train_on,
        max_length=options.max_length,
        on_long=options.on_long,
    )
    what = {"train": "training", "heldout": "held-out"}[part]
    c = data.counts
    note(f"{what} data: {c.examples:,} examples, {c.tokens:,} tokens, {c.supervised_tokens:,} supervised")
    for number, text in (
        (c.skipped, "bad rows skipped (--on-bad-row skip)"),
        (c.truncated, "examples cut to data.max_length"),
        (c.split, "examples split at data.max_length"),
        (c.end_of_turn_untrained, "examples without a trained end-of-turn token: the model may not learn to stop"),
        (c.double_bos, "examples start with two BOS tokens: the template and the data both write one"),
        *((number, f"dropped: {reason}") for reason, number in c.dropped.items()),
    ):
        if number:
            note(f"warning: {what} data: {number:,} {text}")
    return data


def check_out(out: Path, resume: bool = False) -> None:
    """Check that the run directory is free, or with `resume` that it holds a run. Raises `RunError`."""
    started = (out / "config.yaml").exists()
    if resume and not started:
        raise RunError(f"{out} holds no run to resume")
    if not resume and started:
        raise RunError(f"{out} already holds a run: continue it with --resume, or choose another --out")
    if not resume and out.exists() and (not out.is_dir() or any(not _leftover(p) for p in out.iterdir())):
        raise RunError(f"{out} exists and is not empty: choose another --out")


def _leftover(path: Path) -> bool:
    """Whether a run that was killed before it was one may have left this file."""
    return path.suffix == ".tmp" or path.name in (LOCK, "provenance.json")


def check_unchanged(out: Path, was: TrainConfig, now: TrainConfig) -> None:
    """Refuse a configuration that would train anything else than the one that `out` was started with."""
    old, new = _flat(was.model_dump()), _flat(now.model_dump())
    changed = [key for key in new if new[key] != old.get(key) and key not in MAY_CHANGE]
    if changed:
        listed = ", ".join(f"{key} ({old.get(key)!r} → {new[key]!r})" for key in changed)
        raise RunError(f"{out} was started with another configuration: {listed}; resume with the old one or start anew")


def check_resumable(out: Path, config: TrainConfig, setup: Setup) -> None:
    """Refuse to resume with another configuration, other data or another base than the run began with."""
    check_unchanged(out, TrainConfig.load(out / "config.yaml"), config)
    try:
        record = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{out}/provenance.json cannot be read: {error}") from None
    if record["data"]["train"]["hash"] != setup.train_key:
        raise RunError(f"the training data, tokenizer or template is not what {out} was started with: start anew")
    was, now = (Fingerprint.from_dict(base["fingerprint"]) for base in (record["base"], setup.base))
    if reason := mismatch(now, was):
        raise RunError(f"{config.model} is not the base that {out} was started with: {reason}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and not key.endswith("_pattern"):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found

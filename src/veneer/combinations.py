"""Settings that do not go together: one table of rules, each with its reason. Checked when a configuration is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = tuple[Callable[[Any], Any], str]

ADAPTER: list[Rule] = [
    (
        lambda a: a.adalora and a.adalora.target_rank >= a.rank,
        "adapter.adalora.target_rank must be below adapter.rank, which training starts with (1.5 times the target: good)",
    ),
    (
        lambda a: a.adalora and a.init != "kaiming",
        "adapter.adalora has its own start (ΔW = PΛQ with Λ = 0): leave adapter.init out",
    ),
    (
        lambda a: a.adalora and a.rank_pattern,
        "adapter.adalora chooses each module's rank itself: leave adapter.rank_pattern out",
    ),
    (
        lambda a: a.adalora and a.lora_fa,
        "adapter.adalora trains A, which adapter.lora_fa freezes: choose one",
    ),
]
"""Rules over an `AdapterConfig`."""

RUN: list[Rule] = [
    (
        lambda c: c.adapter.adalora and c.train.early_stop,
        "train.early_stop could end the run before adapter.adalora has reached its target rank: leave it out",
    ),
    (
        lambda c: c.adapter.lora_fa and c.train.lora_plus_ratio != 1,
        "train.lora_plus_ratio is B's learning rate over A's, and adapter.lora_fa does not train A: set train.lr",
    ),
]
"""Rules over a `TrainConfig`."""


def conflict(config: Any, rules: list[Rule]) -> str | None:
    """The reason of the first rule that a configuration breaks, or None."""
    return next((reason for broken, reason in rules if broken(config)), None)

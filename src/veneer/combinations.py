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
    (
        lambda a: a.adalora and a.dora,
        "adapter.adalora is not defined with adapter.dora, whose magnitudes outlive a dropped rank: choose one",
    ),
    (
        lambda a: a.adalora and a.lora_bias,
        "adapter.adalora may drop whole modules, and adapter.lora_bias would go with them: choose one",
    ),
    (
        lambda a: a.adalora and a.target_parameters,
        "adapter.adalora ranks modules, not the experts of target_parameters: leave one out",
    ),
    (
        lambda a: a.adalora and a.tied_head == "both",
        "adapter.adalora may drop the embedding, and a head that shares its adapter with it: use tied_head: embedding",
    ),
    (
        lambda a: a.lora_fa and a.target_parameters,
        "adapter.lora_fa saves no memory with target_parameters, whose weights are summed in full: leave one out",
    ),
    (
        lambda a: a.target_parameters and (a.dora or a.lora_bias or a.dropout or a.invocation),
        "adapter.target_parameters go without dora, lora_bias, dropout and invocation: leave one of the two out",
    ),
    (
        lambda a: a.invocation and a.dora,
        "adapter.invocation (aLoRA) is not defined with dora: leave one out",
    ),
    (
        lambda a: a.lora_bias and a.dora,
        "adapter.lora_bias is not defined with dora: leave one out",
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
    (
        lambda c: c.adapter.lora_fa and c.adapter.dora and c.train.lora_fa_correction,
        "train.lora_fa_correction is derived for ΔW = s·B·A, not for adapter.dora: set it to false",
    ),
    (
        lambda c: c.train.lora_plus_embedding_lr and c.train.lora_plus_ratio == 1,
        "train.lora_plus_embedding_lr is part of LoRA+: set train.lora_plus_ratio too",
    ),
    (
        lambda c: c.adapter.invocation and c.train.pack == "on",
        "adapter.invocation (aLoRA) finds one place in each sequence, so rows cannot be packed: leave train.pack out",
    ),
    (
        lambda c: c.train.stream != "off" and c.adapter.init in ("eva", "corda", "lora_ga"),
        "adapter.init eva, corda and lora_ga run the whole base before training, which train.stream does not hold: use "
        "kaiming, pissa or olora",
    ),
    (
        lambda c: c.train.stream == "off" and c.train.resident_blocks not in ("auto", 0),
        "train.resident_blocks are blocks of a streamed base that stay on the device, and train.stream is off: set it to host "
        "or disk, or leave train.resident_blocks out",
    ),
    (
        lambda c: c.train.stream != "off" and c.quant not in ("none", "nf4", "fp4", "int8"),
        "train.stream goes with quant none, nf4, fp4 or int8: choose one of them",
    ),
    (
        lambda c: c.train.stream != "off" and (c.adapter.trainable_tokens or c.adapter.new_tokens),
        "train.stream keeps the embedding on the host, so its rows are not trained: leave trainable_tokens and new_tokens "
        "out, or use stream: off",
    ),
]
"""Rules over a `TrainConfig`."""


def conflict(config: Any, rules: list[Rule]) -> str | None:
    """The reason of the first rule that a configuration breaks, or None."""
    return next((reason for broken, reason in rules if broken(config)), None)

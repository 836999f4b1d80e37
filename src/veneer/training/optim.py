"""AdamW over an adapter's parameters, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from veneer.config import OptimConfig


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Learning rate of step 1 … total as a share of the peak: linear warm-up, then cosine or linear to 0, or constant.

    Step t of the warm-up has t/warmup; after it, with p = (t − warmup)/(total − warmup + 1) in (0, 1): cosine
    (1 + cos πp)/2, linear 1 − p. The last step's rate is above 0, so that no step is wasted.
    """
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / (total - warmup + 1)
    return (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warm-up: a count, or below 1 a share of all steps."""
    return min(total, int(warmup) if warmup >= 1 else round(warmup * total))


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused where torch has it for the device.

    LoRA+ (arXiv:2402.12354): B learns at lora_plus_ratio times A's rate.
    """
    is_b = {name: name.endswith(".lora_B") for name in parameters}
    groups = [
        {"params": [p for n, p in parameters.items() if is_b[n] == b], "ratio": config.lora_plus_ratio if b else 1.0}
        for b in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    devices = {p.device.type for p in parameters.values()}
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=devices <= {"cpu", "cuda"},
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its rate: the base rate times the group's ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]

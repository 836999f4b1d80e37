"""AdamW over an adapter's parameters, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from veneer.adapter.bank import Bank
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


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, embeddings: Collection[str] = ()
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused where torch has it for the device.

    `parameters` by the names of `Bank.parameters`; frozen ones are left out. `embeddings` names the modules among them
    that are embeddings. Vectors (biases, norms, magnitudes) are not decayed.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            key = lr_ratio(name, parameter, config, name.rpartition(".")[0] in embeddings), decay
            groups.setdefault(key, []).append(parameter)
    devices = {p.device.type for p in parameters.values()}
    return torch.optim.AdamW(
        [{"params": group, "ratio": ratio, "weight_decay": decay} for (ratio, decay), group in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=devices <= {"cpu", "cuda"},
    )


def lr_ratio(name: str, parameter: Tensor, config: OptimConfig, is_embedding: bool = False) -> float:
    """A parameter's learning rate as a multiple of the base rate: LoRA+ (Hayou et al. 2024, arXiv:2402.12354).

    B and, as in PEFT, vectors such as biases learn at lora_plus_ratio times A's rate; the factors of an embedding at
    lora_plus_embedding_lr, where that is set.
    """
    if is_embedding and config.lora_plus_embedding_lr is not None:
        return config.lora_plus_embedding_lr / config.lr
    return config.lora_plus_ratio if name.endswith(".lora_B") or parameter.ndim == 1 else 1.0


def lora_fa_gradient(grad: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """The gradient of B that brings ΔW nearest to a full fine-tuning step while A stays: g (A Aᵀ)⁺ / s².

    grad (d_out, r) is ∂L/∂B = s·G Aᵀ of a full gradient G (d_out, d_in) and lora_A (r, d_in), a convolution's with
    kernel dimensions besides, which are flattened. With the result Ĝ the change s·Ĝ A of W is G projected on A's rows:
    min ‖s·Ĝ A − G‖_F (LoRA-FA, arXiv:2308.03303 in its later version, and PEFT's LoraFAOptimizer). Computed in float32;
    returned in grad's shape and dtype.
    """
    a = lora_A.float().flatten(1)
    found = grad.float().flatten(1) @ torch.linalg.pinv(a @ a.T, hermitian=True) / scaling**2
    return found.view_as(grad).to(grad.dtype)


def correct_lora_fa(bank: Bank, name: str) -> None:
    """Apply `lora_fa_gradient` to every B of an adapter, in place."""
    for layer in bank.layers.values():
        if name in layer.lora_B and (b := layer.lora_B[name]).grad is not None:
            b.grad.copy_(lora_fa_gradient(b.grad, layer.lora_A[name].detach(), layer.scaling[name]))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its rate: the base rate times the group's ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]

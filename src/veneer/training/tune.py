"""Learn the weights of a combination from a few examples (LoraHub, Huang et al. 2023, arXiv:2307.13269)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter.attach import get_bank
from veneer.base.load import load_base
from veneer.config import TrainConfig
from veneer.errors import ConfigError
from veneer.formats.adapter_file import read_adapter
from veneer.formats.combine import check_bases, check_combinable
from veneer.formats.peft import load_adapter
from veneer.training.forward import RowModel
from veneer.training.setup import load_data


@dataclass(frozen=True)
class Tuned:
    """The best weights found, in the adapters' order, and the mean loss per supervised token with the first and with these.

    `losses` are those of each step; the objective adds l1·Σ|w_i|.
    """

    weights: list[float]
    before: float
    after: float
    examples: int
    losses: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        found = ", ".join(f"{w:.3f}" for w in self.weights)
        return f"tuned weights  {found}  (loss {self.before:.4f} → {self.after:.4f} on {self.examples} examples)"


def tune_weights(
    adapters: Sequence[str | Path],
    data: str | list[str],
    model: str,
    *,
    start: Sequence[float] | None = None,
    steps: int = 40,
    lr: float = 0.05,
    l1: float = 0.05,
    examples: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """The w that make the stack Σ w_i ΔW_i on the base `model` best on the first `examples` examples of `data`.

    Adam on ∂(loss + l1·Σ|w_i|)/∂w from `start` (1/n each when absent), every step over all examples; the step with the
    least objective counts. LoraHub searches without gradients and multiplies Σ w_i B_i by Σ w_i A_i; this is the exact
    stack, so that method cat gives the adapter that was tuned. Raises what loading does, and `ConfigError`.
    """
    sources = [read_adapter(path) for path in adapters]
    check_combinable(sources)
    check_bases(sources, force)
    if start is not None and len(start) != len(sources):
        raise ConfigError(f"{len(start)} weights to start from for {len(sources)} adapters")
    if steps < 1:
        raise ConfigError("tuning needs at least one step")
    base, tokenizer = load_base(model, device=device, dtype=dtype)
    for i, path in enumerate(adapters):
        load_adapter(base, path, name=str(i), force=force, trainable=False, tokenizer=tokenizer)
    config = TrainConfig(model=model, data={"train": data, "limit": examples}, out="unused")
    prepared = load_data(config, "train", tokenizer, note)
    stack = WeightedStack(base, [str(i) for i in range(len(sources))])
    w = torch.tensor(list(start or [1 / len(sources)] * len(sources)), dtype=torch.float64, requires_grad=True)
    optimiser, losses, seen = torch.optim.Adam([w], lr=lr), [], []
    rows = RowModel(base.eval())
    rows.check(prepared)
    with rows.attention():
        packed = rows.pack(list(prepared), config.train.micro_batch_tokens, True)
        for step in range(steps + 1):
            loss, gradient = stack.loss_and_gradient(w.detach(), rows, packed)
            losses.append(loss)
            seen.append((loss + l1 * float(w.detach().abs().sum()), step, w.detach().tolist()))
            w.grad = gradient + l1 * w.detach().sign()
            if step < steps:
                optimiser.step()
    _, best, weights = min(seen)
    return Tuned(weights, losses[0], losses[best], len(prepared), losses)


class WeightedStack:
    """All adapters of a bank at once, as a function of their weights.

    The layers act with P_i = w_i B_i in place of B_i, so that ∂L/∂w_i = Σ_layers ⟨∂L/∂P_i, B_i⟩: exact, also at w_i = 0,
    and with the kernels that training uses.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        bank = get_bank(model)
        bank.activate(dict.fromkeys(names, 1.0))
        self.live = [[bank.layers[path].lora_B[name] for path in bank.entries[name].targets] for name in names]
        self.start = [[parameter.detach().clone() for parameter in own] for own in self.live]
        for _, parameter, _ in self._all():
            parameter.requires_grad_(True).grad = None

    def loss_and_gradient(self, weights: Tensor, rows: RowModel, packed: Sequence[Any]) -> tuple[float, Tensor]:
        """Mean loss per supervised token, and its gradient (n) in float64."""
        with torch.no_grad():
            for i, parameter, start in self._all():
                parameter.copy_(float(weights[i]) * start)
        count, total, gradient = sum(len(row.targets) for row in packed), 0.0, torch.zeros_like(weights)
        for row in packed:
            with rows.row(row) as loss:
                (loss / count).backward()
                total += float(loss.detach()) / count
            for i, parameter, start in self._all():
                if parameter.grad is not None:
                    gradient[i] += float((parameter.grad * start).sum(dtype=torch.float64))
                    parameter.grad = None
        return total, gradient

    def _all(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for i, (live, start) in enumerate(zip(self.live, self.start)):
            for parameter, first in zip(live, start):
                yield i, parameter, first

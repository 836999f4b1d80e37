"""Passes over calibration batches: what the targets are given, and the gradient of their weights.

The model is not changed: hooks come and go, `train`/`eval` and every requires_grad are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer.adapter.targets import Target
from veneer.errors import ConfigError

Batches = Iterable[Mapping[str, Any]]


class Collector(Protocol):
    """What takes in the rows (n, d_in), float32, that a target is given, batch by batch."""

    def update(self, x: Tensor) -> None: ...


class Covariance:
    """CorDA's C (d_in, d_in): the mean over batches of xᵀx, each batch first divided by |its largest value|."""

    def __init__(self) -> None:
        self.sum, self.batches = 0.0, 0

    def update(self, x: Tensor) -> None:
        """Take in further rows x (n, d)."""
        if len(x):
            x = x / x.max().abs().clamp_min(torch.finfo(x.dtype).tiny)
            self.sum, self.batches = self.sum + x.t() @ x, self.batches + 1

    @property
    def mean(self) -> Tensor:
        """C, float32."""
        return self.sum / self.batches


def collect_inputs(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Batches,
    make: Callable[[], Collector],
    *,
    supervised_only: bool = False,
) -> list[Collector]:
    """One collector per target, fed with the rows it is given; targets given the very same tensor share one.

    Padding (attention_mask 0) is left out, and with `supervised_only` what has the label -100. The mask does not reach
    a target that is given no (batch, tokens, …) input, such as an expert that sees a selection: it counts every row.
    Raises `ConfigError` naming a target that no batch reached.
    """
    collectors: dict[str, Collector] = {}
    leaders: set[str] = set()
    state: dict[str, Any] = {"x": None, "name": "", "mask": None}

    def watch(name: str) -> Callable:
        def see(module: nn.Module, args: tuple) -> None:
            if name not in collectors:
                same = args[0] is state["x"]  # the query, key and value of one block, say: decompose once
                collectors[name] = collectors[state["name"]] if same else make()
                leaders.update([] if same else [name])
            state["x"], state["name"] = args[0], name
            if name in leaders:
                collectors[name].update(_rows(args[0].detach(), state["mask"]))

        return see

    hooks = [target.module.register_forward_pre_hook(watch(target.name)) for target in targets]
    try:
        with _frozen(model), torch.no_grad():
            for batch in _batches(model, calibration):
                state["mask"] = _mask(batch, supervised_only)
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    _check_reached(targets, collectors)
    return [collectors[target.name] for target in targets]


def weight_gradients(model: nn.Module, targets: Sequence[Target], calibration: Batches) -> list[Tensor]:
    """∇W of each target (d_out, d_in), float32 on the CPU: the mean over batches of the gradient of their loss.

    Computed as (∂loss/∂y)ᵀ x as the backward pass goes through a target, so that the device holds one ∇W at a time and
    a quantised weight has one too. Raises `ConfigError` (no loss, or a target that no batch reached).
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def see(module: nn.Module, args: tuple, y: Tensor) -> None:
            x = args[0].detach()

            def add(gradient: Tensor) -> None:
                new = gradient.flatten(0, -2).float().t() @ x.flatten(0, -2).float()
                sums[name] = sums[name].add_(new.cpu()) if name in sums else new.cpu()

            if not y.requires_grad:
                y.requires_grad_()  # nothing before this target is trained: the graph starts here
            y.register_hook(add)

        return see

    count, hooks = 0, [target.module.register_forward_hook(watch(target.name)) for target in targets]
    try:
        with _frozen(model), torch.enable_grad():
            for batch in _batches(model, calibration):
                loss = getattr(model(**batch), "loss", None)
                if loss is None:
                    raise ConfigError("init 'lora_ga' needs calibration batches with labels: the model gave no loss")
                loss.backward()
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    _check_reached(targets, sums)
    return [sums[target.name].div_(count) for target in targets]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradients of the model's own parameters, for the length of a block."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)


def _batches(model: nn.Module, calibration: Batches) -> Iterator[dict[str, Any]]:
    device = next(model.parameters()).device
    for batch in calibration:
        yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _mask(batch: Mapping[str, Any], supervised_only: bool) -> Tensor | None:
    """(batch, tokens), true where a row counts; None: everywhere."""
    mask = batch.get("attention_mask")
    mask = mask.bool() if mask is not None and mask.dim() == 2 else None
    if supervised_only and batch.get("labels") is not None:
        labelled = batch["labels"] != -100
        mask = labelled if mask is None else mask & labelled
    return mask


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask]
    return x.flatten(0, -2).float() if x.dim() > 2 else x.float()


def _check_reached(targets: Sequence[Target], seen: Mapping[str, Any]) -> None:
    missing = [target.name for target in targets if target.name not in seen]
    if missing:
        raise ConfigError(
            f"no calibration batch reached {len(missing)} of the adapted modules, first {missing[0]}: raise "
            f"init_options.examples, or leave them out with exclude_modules"
        )

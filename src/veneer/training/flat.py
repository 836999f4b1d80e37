"""The optimiser over flat buffers: an adapter has hundreds of small parameters, and one update should be one kernel."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import OptimConfig
from veneer.errors import ConfigError
from veneer.training.optim import make_optimizer
from veneer.training.sums import Sums


class FlatOptimizer:
    """`make_optimizer`'s AdamW with the parameters of each group in one buffer, and their gradients in another.

    The parameters become views of their buffer, so whoever holds them sees every update. AdamW works element by element,
    so the result is the same. A parameter that no gradient reached counts as one whose gradient is zero. Gradients are
    added by `veneer.training.sums` in a backward pass; after it each parameter's `grad` is its view. With
    config.optimizer an 8-bit one of bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861) takes AdamW's place.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, embeddings: Collection[str] = ()
    ) -> None:
        plain = make_optimizer(parameters, config, embeddings)
        self.sums: list[Sums] = []
        groups = []
        for group in plain.param_groups:
            by_kind: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_kind.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            groups += [{**group, "params": [self._flatten(same)]} for same in by_kind.values()]
        self.inner = _inner(groups, config)
        if any(flat.is_cuda for flat in self.buffers):
            torch.cuda.empty_cache()  # where the parameters were one by one there is no room for what is large

    def _flatten(self, parameters: list[nn.Parameter]) -> nn.Parameter:
        flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))
        flat.grad = torch.zeros_like(flat)
        sizes = [p.numel() for p in parameters]
        for p, data, grad in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes)):
            p.data, p.grad = data.view_as(p), grad.view_as(p)
        views = [p.grad for p in parameters]
        self.sums.append(Sums(parameters, views))
        weakref.finalize(self, self.sums[-1].hook()).atexit = False  # the parameters may live on without this
        return flat

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The flat groups, for the learning rate."""
        return self.inner.param_groups

    @property
    def members(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter with the view that is its gradient."""
        return [pair for sums in self.sums for pair in zip(sums.parameters, sums.sums)]

    @property
    def buffers(self) -> list[nn.Parameter]:
        """The flat parameters, one for each group."""
        return [group["params"][0] for group in self.param_groups]

    def zero_grad(self) -> None:
        """Set every gradient to zero, in place."""
        for flat in self.buffers:
            flat.grad.zero_()
        for sums in self.sums:
            sums.forget()

    def gather(self) -> None:
        """Take in gradients that were put in a parameter's `grad` instead of added to it."""
        for p, grad in self.members:
            if p.grad is None:
                grad.zero_()
            elif p.grad is not grad:
                grad.copy_(p.grad)
            p.grad = grad

    def norm(self) -> Tensor:
        """The norm of all gradients together, a scalar on their device."""
        self.gather()
        return torch.nn.utils.get_total_norm([flat.grad for flat in self.buffers])

    def scale_(self, factor: float) -> None:
        """Multiply every gradient."""
        for flat in self.buffers:
            flat.grad.mul_(factor)

    def step(self) -> None:
        """One update."""
        self.gather()
        self.inner.step()

    def state(self) -> dict[str, Tensor]:
        """The optimiser's own tensors on the CPU, by <group>.<name>."""
        found = {}
        for i, flat in enumerate(self.buffers):
            for key, value in self.inner.state[flat].items():
                if isinstance(value, (int, float)) or torch.is_tensor(value):
                    found[f"{i}.{key}"] = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises `KeyError` or `RuntimeError` where it is another optimiser's."""
        for i, flat in enumerate(self.buffers):
            if hasattr(self.inner, "init_state"):  # bitsandbytes' own layout, paged memory included
                self.inner.check_overrides(), self.inner.to_gpu()
                self.inner.initialized = True
                self.inner.init_state(self.param_groups[i], flat, i, 0)
                for key, value in self.inner.state[flat].items():
                    if torch.is_tensor(value):
                        value.copy_(tensors[f"{i}.{key}"])
                    elif isinstance(value, (int, float)):
                        self.inner.state[flat][key] = type(value)(tensors[f"{i}.{key}"])
                continue
            state = {key: tensors[f"{i}.{key}"].to(flat.device) for key in ("exp_avg", "exp_avg_sq")}
            if state["exp_avg"].shape != flat.shape:
                raise RuntimeError(f"group {i} has {flat.numel()} values, not {state['exp_avg'].numel()}")
            step = tensors[f"{i}.step"]  # the fused kernel wants its counter beside the weights
            self.inner.state[flat] = state | {"step": step.to(flat.device) if flat.is_cuda else step.clone()}


def _inner(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    own = [{k: g[k] for k in ("params", "ratio", "weight_decay")} for g in groups]
    if config.optimizer == "adamw":
        devices = {g["params"][0].device.type for g in groups}
        return torch.optim.AdamW(own, fused=devices <= {"cpu", "cuda"}, **options)
    try:
        from bitsandbytes import optim
    except ImportError:
        raise ConfigError(
            f"train.optimizer: {config.optimizer} needs bitsandbytes: pip install 'veneer[quant]', or use adamw"
        ) from None
    make = {"adamw-8bit": optim.AdamW8bit, "paged-adamw": optim.PagedAdamW, "paged-adamw-8bit": optim.PagedAdamW8bit}
    if not all(g["params"][0].is_cuda for g in groups):
        raise ConfigError(f"train.optimizer: {config.optimizer} needs an NVIDIA GPU: use adamw")
    return make[config.optimizer](own, **options)

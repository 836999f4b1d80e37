"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ΔW = s·P Λ Q, whose rank the training itself spreads over the modules.

P (d_out, r) and Q (r, d_in) are kept near orthonormal by a regulariser, Λ (r, 1) is diagonal, and triplets
{P[:, i], λ_i, Q[i]} of little importance are switched off by λ_i = 0 until the budget of all modules together is met.

A layer knows nothing of this: it is a plain LoRA with B = P and A = Λ∘Q (a convolution's flattened to matrices).
`AdaLora` keeps Λ and Q beside it, turns A's gradient into theirs (∂/∂Q = Λ∘∂/∂A, ∂/∂λ_i = Σ_j ∂/∂A_ij Q_ij) and writes
A anew after each step. So what takes a LoRA takes AdaLoRA, and what is saved is a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from veneer.adapter.bank import Bank
from veneer.adapter.math import alpha_of
from veneer.config import AdaLoraConfig
from veneer.errors import ConfigError, RunError, TargetError

INIT_STD = 0.02  # of P and Q, as in the paper's code and in PEFT


def phases(config: AdaLoraConfig, total: int) -> tuple[int, int]:
    """(tinit, tfinal) in steps; a value below 1 is a share of `total`. `ConfigError` if no step is left between."""
    tinit, tfinal = (int(t) if t >= 1 else round(t * total) for t in (config.tinit, config.tfinal))
    if tinit + tfinal >= total:
        raise ConfigError(
            f"adapter.adalora: {tinit} steps at the full rank (tinit) and {tfinal} at the final one (tfinal) leave none "
            f"of the run's {total} to allocate ranks in: lower them, or train for more steps"
        )
    return tinit, tfinal


def budget_at(step: int, total: int, tinit: int, tfinal: int, initial: int, target: int) -> int:
    """Triplets that may live after step 1 … total, over all modules (the schedule of section 3.3, eq. 12).

    b = initial up to tinit; target from total − tfinal on; between, target + (initial − target)(1 − p)³ rounded down,
    with p = (t − tinit)/(total − tfinal − tinit).
    """
    if step <= tinit:
        return initial
    if step > total - tfinal:
        return target
    left = 1 - (step - tinit) / (total - tfinal - tinit)
    return int((initial - target) * left**3 + target)


def smooth_(sensitivity: Tensor, uncertainty: Tensor, weight: Tensor, grad: Tensor, beta1: float, beta2: float) -> None:
    """With I = |w·∂L/∂w|: Ī ← β₁Ī + (1−β₁)I, then Ū ← β₂Ū + (1−β₂)|I − Ī|, in place, all of one shape (eq. 8–10)."""
    now = (weight * grad).abs().float()
    sensitivity.mul_(beta1).add_(now, alpha=1 - beta1)
    uncertainty.mul_(beta2).add_((now - sensitivity).abs(), alpha=1 - beta2)


def triplet_scores(of_p: Tensor, of_values: Tensor, of_q: Tensor) -> Tensor:
    """S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) (eq. 7), (r,), from the entries' scores s = Ī·Ū (eq. 11).

    of_p (d_out, r), of_values (r, 1), of_q (r, d_in).
    """
    return of_values.flatten() + of_p.mean(0) + of_q.mean(1)


def keep_best(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Which triplets are among the `budget` best of all modules together: a boolean (r,) for each module's scores.

    Among equals the earlier module and the lower index win, so that the budget is met exactly.
    """
    order = torch.cat([s.flatten() for s in scores]).sort(descending=True, stable=True).indices
    keep = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    keep[order[:budget]] = True
    return list(keep.split([s.numel() for s in scores]))


def orthogonality(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over all P and Q of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F, from pairs of P (d_out, r) and Q (r, d_in).

    The paper's eq. 4 has squared norms and a sum; its code and PEFT have the norm and the mean, which the weights in
    use (0.1 to 0.5) are made for.
    """
    grams = [gram for p, q in factors for gram in (p.T @ p, q @ q.T)]
    return torch.stack([(g - torch.eye(len(g), dtype=g.dtype, device=g.device)).norm() for g in grams]).mean()


class AdaLora:
    """Allocates the ranks of one adapter of a bank in the course of `total` steps.

    In each step, after the backward pass: `backward()`, the optimiser's step over `parameters()`, then `step(t)` with
    t = 1 … total; at the end `finish()`. Raises `ConfigError` where the schedule does not fit.
    """

    def __init__(self, bank: Bank, name: str, config: AdaLoraConfig, total: int, seed: int = 0) -> None:
        self.bank, self.name, self.config, self.total = bank, name, config, total
        self.tinit, self.tfinal = phases(config, total)
        self.paths = list(bank.entries[name].targets)
        self.values: dict[str, nn.Parameter] = {}
        self.right: dict[str, nn.Parameter] = {}
        self.keep: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for path in self.paths:
            a, b = self._factors(path)
            if a.flatten(1).shape[0] != b.flatten(1).shape[1]:
                raise TargetError(f"{path}: AdaLoRA is not defined for grouped convolutions: exclude it")
            with torch.no_grad():
                b.copy_(torch.randn(b.shape, generator=generator) * INIT_STD)
                self.right[path] = nn.Parameter(a.new_empty(a.shape).copy_(torch.randn(a.shape, generator=generator)))
                self.right[path].mul_(INIT_STD)
            self.values[path] = nn.Parameter(a.new_zeros(len(a), 1))
            self.keep[path] = torch.ones(len(a), dtype=torch.bool, device=a.device)
        self.averages = {
            key: (torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32))
            for key, p in self._triplets().items()
        }
        self.initial = sum(len(keep) for keep in self.keep.values())
        self.target = config.target_rank * len(self.paths)
        if self.target >= self.initial:
            raise ConfigError(
                f"adapter.adalora.target_rank {config.target_rank} is not below the rank {self.initial // len(self.paths)} "
                f"that training starts with: raise adapter.rank (the paper uses 1.5 times the target)"
            )
        self._write()

    def _factors(self, path: str) -> tuple[nn.Parameter, nn.Parameter]:
        layer = self.bank.layers[path]
        return layer.lora_A[self.name], layer.lora_B[self.name]

    def _triplets(self) -> dict[str, nn.Parameter]:
        found = {}
        for path in self.paths:
            found[f"{path}.lora_A"], found[f"{path}.lora_E"] = self.right[path], self.values[path]
            found[f"{path}.lora_B"] = self._factors(path)[1]
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimiser trains: the adapter's parameters, with Q for A, and Λ as <module>.lora_E."""
        return self.bank.parameters(self.name) | self._triplets()

    def backward(self) -> None:
        """Turn the gradient of each A into those of Λ and Q, and add the regulariser's gradient to P and Q."""
        with torch.no_grad():
            for path in self.paths:
                a, _ = self._factors(path)
                q, values = self.right[path], self.values[path]
                q.grad = None if a.grad is None else _scaled(a.grad, values)
                values.grad = None if a.grad is None else (a.grad * q).flatten(1).sum(1, keepdim=True)
                a.grad = None
        if self.config.orthogonality:
            pairs = [(self._factors(path)[1].flatten(1), self.right[path].flatten(1)) for path in self.paths]
            (self.config.orthogonality * orthogonality(pairs)).backward()

    @torch.no_grad()
    def step(self, step: int) -> None:
        """After the optimiser's step number `step`: update the importances, mask Λ where it is due, write A."""
        last = self.total - self.tfinal
        if step < last:
            for key, p in self._triplets().items():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                smooth_(*self.averages[key], p, grad, self.config.beta1, self.config.beta2)
        masking = self._allocates(step)
        if masking:
            budget = budget_at(step, self.total, self.tinit, self.tfinal, self.initial, self.target)
            keep = keep_best([self._scores(path) for path in self.paths], budget)
            self.keep = dict(zip(self.paths, keep))
        if masking or step > last:
            for path, values in self.values.items():
                values.masked_fill_(~self.keep[path][:, None], 0)
        self._write()

    def _allocates(self, step: int) -> bool:
        last = self.total - self.tfinal
        return step == last or self.tinit < step < last and step % self.config.deltaT == 0

    def allocations(self) -> int:
        """How often ranks are allocated in the run."""
        return sum(map(self._allocates, range(1, self.total + 1)))

    def _scores(self, path: str) -> Tensor:
        return triplet_scores(*(torch.mul(*self.averages[f"{path}.lora_{leaf}"]).flatten(1) for leaf in "BEA"))

    @torch.no_grad()
    def _write(self) -> None:
        for path in self.paths:
            self._factors(path)[0].copy_(_scaled(self.right[path], self.values[path]))

    def ranks(self) -> dict[str, int]:
        """Each module's rank now: its triplets that the last allocation kept."""
        return {path: int(keep.sum()) for path, keep in self.keep.items()}

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs besides the adapter's and the optimiser's own state, on the CPU."""
        found: dict[str, Tensor] = {}
        for path in self.paths:
            found[f"{path}.lora_A"], found[f"{path}.lora_E"] = self.right[path].detach(), self.values[path].detach()
            found[f"{path}.keep"] = self.keep[path]
        for key, (sensitivity, uncertainty) in self.averages.items():
            found[f"{key}.sensitivity"], found[f"{key}.uncertainty"] = sensitivity, uncertainty
        return {key: value.to("cpu", copy=True).contiguous() for key, value in found.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave; `RunError` if it is another adapter's."""
        mine = self.state()
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in state.items()}:
            raise RunError("the AdaLoRA state does not belong to this adapter: its tensors are others")
        for path in self.paths:
            self.right[path].copy_(state[f"{path}.lora_A"])
            self.values[path].copy_(state[f"{path}.lora_E"])
            self.keep[path].copy_(state[f"{path}.keep"])
        for key, pair in self.averages.items():
            for average, leaf in zip(pair, ("sensitivity", "uncertainty")):
                average.copy_(state[f"{key}.{leaf}"])
        self._write()

    def finish(self) -> list[str]:
        """Make the adapter a plain LoRA of the ranks found; returns the modules that keep none and are dropped."""
        return prune(self.bank, self.name, self.keep)


def _scaled(rows: Tensor, values: Tensor) -> Tensor:
    """Each row (along the first dimension) times its value; rows (r, …), values (r, 1)."""
    return rows * values.view(-1, *(1,) * (rows.ndim - 1))


def prune(bank: Bank, name: str, keep: Mapping[str, Tensor]) -> list[str]:
    """Drop the ranks that `keep` (module → boolean (r,)) says, in place, keeping each module's scaling.

    The adapter's configuration gets each module's rank and the alpha that gives the scaling it was trained with.
    Returns the modules of rank 0, which leave the adapter: their ΔW is 0. Raises `RunError` if none would be left.
    """
    entry = bank.entries[name]
    ranks = {path: int(keep[path].sum()) for path in entry.targets}
    dropped = [path for path, rank in ranks.items() if not rank]
    if len(dropped) == len(ranks):
        raise RunError("no module keeps a rank above 0: the adapter would be empty")
    config, alphas = entry.config, {}
    for path, rank in ranks.items():
        layer = bank.layers[path]
        a, b = layer.lora_A[name].detach(), layer.lora_B[name].detach()
        scaling, options = layer.scaling[name], layer.options[name]
        layer.remove(name)
        if rank:
            alphas[path] = alpha_of(rank, scaling, options.rslora)
            chosen = keep[path].to(a.device)
            layer.add(name, a[chosen].clone(), b[:, chosen].clone(), alpha=alphas[path], options=options)
    entry.targets = [path for path in entry.targets if ranks[path]]
    # A key of these patterns also means every longer name that it ends: "^" keeps it to itself where there is one.
    key = {p: f"^{p}" if any(other.endswith(f".{p}") for other in entry.targets) else p for p in entry.targets}
    patterns = {
        "rank_pattern": {key[p]: ranks[p] for p in entry.targets},
        "alpha_pattern": {key[p]: alphas[p] for p in entry.targets},
    }
    entry.config = config.model_copy(update=patterns | {"target_modules": list(entry.targets)})
    return dropped

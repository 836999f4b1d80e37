"""`start`: the factors of every target as the configuration's initialisation has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from veneer.adapter.frozen import is_quantised, weight_of
from veneer.adapter.init import random, spectral
from veneer.adapter.init.calibration import Batches, Covariance, collect_inputs, weight_gradients
from veneer.adapter.init.eva import StreamedPCA, redistribute
from veneer.adapter.math import alpha_of, scaling
from veneer.adapter.targets import Target
from veneer.config import AdapterConfig
from veneer.errors import ConfigError

RANDOM = {"kaiming": random.kaiming, "gaussian": random.gaussian, "orthogonal": random.orthogonal}
DATA_DRIVEN = ("eva", "corda", "lora_ga")
"""Initialisations that need calibration batches."""
COMPUTED = (*DATA_DRIVEN, "pissa", "olora", "loftq")
"""Those that take more than a random draw; for linear layers only."""


@dataclass(frozen=True)
class Start:
    """How one target's factors start: float32 lora_A (rank, d_in) and lora_B (d_out, rank), on the CPU.

    `changes_base`: the factors assume the base W − s·B·A. `rank` and `alpha`, where given, replace the target's; rank 0
    leaves it as it is (EVA).
    """

    lora_A: Tensor
    lora_B: Tensor
    changes_base: bool = False
    rank: int | None = None
    alpha: float | None = None


def start(
    model: nn.Module,
    targets: Sequence[Target],
    config: AdapterConfig,
    *,
    seed: int | None = None,
    calibration: Batches | None = None,
    float_weights: Callable[[str], Tensor] | None = None,
) -> list[Start]:
    """The starts of `targets`, in their order. `model` is run for data-driven ones and left as it was.

    `seed`: absent, torch's global generator. `calibration`: keyword arguments for `model(**batch)`, with labels where
    the loss is needed ("lora_ga"). `float_weights` ("loftq"): module name → the weight (d_out, d_in) that was
    quantised. Raises `ConfigError` where the initialisation cannot be had for a target, naming it.
    """
    for target in targets:
        check(target, config, quantised=is_quantised(target.module))
    if config.init in DATA_DRIVEN and calibration is None:
        raise ConfigError(
            f"init {config.init!r} is computed from data: pass calibration=[{{'input_ids': …, 'labels': …}}, …], "
            f"batches for model(**batch)"
        )
    for name, given, users in (
        ("calibration", calibration, DATA_DRIVEN),
        ("float_weights", float_weights, ("loftq",)),
    ):
        if given is not None and config.init not in users:
            raise ConfigError(f"{name} has no effect with init {config.init!r}: leave it out")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if config.init in RANDOM:
        return [Start(*_random(target, config.init, generator)) for target in targets]
    with torch.no_grad():
        if config.init == "eva":
            return _eva(model, targets, config, calibration, generator)
        if config.init == "loftq":
            return [_loftq(target, config, float_weights) for target in targets]
        pairs = _SPECTRAL[config.init](model, targets, config, calibration, generator)
        return [Start(lora_A.cpu(), lora_B.cpu(), changes_base=True) for lora_A, lora_B in pairs]


def check(target: Target, config: AdapterConfig, *, quantised: bool) -> None:
    """Raise `ConfigError` where this initialisation is not defined for this target."""
    what, kind = f"init {config.init!r}", target.kind
    if config.init in ("kaiming", "gaussian"):
        return
    if kind != "linear" and not (config.init == "orthogonal" and kind == "attention"):
        raise ConfigError(
            f"{what} is for linear layers and {target.name} is of kind {kind}: exclude it, or use init: kaiming"
        )
    if config.init == "orthogonal" and target.rank % 2:
        raise ConfigError(f"{what} needs an even rank, and {target.name} has {target.rank}")
    limit = min(target.d_in, target.d_out)
    if target.rank > limit:
        raise ConfigError(f"{what}: rank {target.rank} is above what {target.name} holds, which is {limit}")
    if config.init == "lora_ga" and 2 * target.rank > limit:
        raise ConfigError(
            f"{what} takes 2 × rank directions of the gradient, and {target.name} has {limit}: use at most rank "
            f"{limit // 2} there (rank_pattern)"
        )
    if config.init == "loftq" and not quantised:
        raise ConfigError(f"{what} makes up for quantisation, and {target.name} is not quantised: use init: pissa")


def _random(target: Target, init: str, generator: Generator | None) -> tuple[Tensor, Tensor]:
    layer, initialise = target.layer(), random.embedding if target.kind == "embedding" else RANDOM[init]
    copies = layer.experts if target.kind == "parameter" else 1
    lora_A, lora_B = initialise(target.rank * copies, layer.d_in, layer.d_out, generator)
    return lora_A, lora_B[:, : target.rank // target.module.groups] if target.kind == "conv" else lora_B


def _scaling(target: Target, config: AdapterConfig) -> float:
    return scaling(target.rank, target.alpha, config.rslora)


def _pissa(model, targets, config, calibration, generator) -> Iterator[tuple[Tensor, Tensor]]:
    iterations = config.init_options.pissa_iterations
    for target in targets:
        weight = weight_of(target.module).float()
        yield spectral.pissa(weight, target.rank, _scaling(target, config), iterations, generator)


def _olora(model, targets, config, calibration, generator) -> Iterator[tuple[Tensor, Tensor]]:
    for target in targets:
        yield spectral.olora(weight_of(target.module).float(), target.rank)


def _corda(model, targets, config, calibration, generator) -> Iterator[tuple[Tensor, Tensor]]:
    seen = collect_inputs(model, targets, calibration, Covariance)
    for target, covariance in zip(targets, seen, strict=True):
        _check_rows(target, covariance.batches, 1)
        yield spectral.corda(
            weight_of(target.module).float(),
            covariance.mean,
            target.rank,
            _scaling(target, config),
            config.init_options.corda_method,
        )


def _lora_ga(model, targets, config, calibration, generator) -> Iterator[tuple[Tensor, Tensor]]:
    options = config.init_options
    gradients = weight_gradients(model, targets, calibration)
    for i, target in enumerate(targets):
        weight = weight_of(target.module).float()
        gradient, gradients[i] = gradients[i].to(weight.device), None
        yield spectral.lora_ga(
            gradient,
            weight,
            target.rank,
            _scaling(target, config),
            generator,
            direction=options.lora_ga_direction,
            scale=options.lora_ga_scale,
            gamma=options.lora_ga_gamma,
        )


_SPECTRAL = {"pissa": _pissa, "olora": _olora, "corda": _corda, "lora_ga": _lora_ga}


def _loftq(target: Target, config: AdapterConfig, float_weights: Callable[[str], Tensor] | None) -> Start:
    if float_weights is None:
        raise ConfigError(
            "init 'loftq' needs the weights from before quantisation: load the base from a float checkpoint, or pass "
            "float_weights, a function from module name to weight"
        )
    quantised = weight_of(target.module).float()
    weight = float_weights(target.name).to(quantised)
    if weight.shape != quantised.shape or (weight - quantised).norm() > 0.5 * weight.norm():
        raise ConfigError(f"init 'loftq': the float weight given for {target.name} is not what was quantised there")
    lora_A, lora_B = spectral.loftq(weight, quantised, target.rank, _scaling(target, config))
    return Start(lora_A.cpu(), lora_B.cpu())


def _eva(model, targets, config, calibration, generator) -> list[Start]:
    """A = the leading components of the inputs, B = 0; ranks follow the variance, alpha the rank, so that s stays."""
    options = config.init_options
    limits = [min(round(options.eva_rho * t.rank), t.d_in, t.d_out) for t in targets]
    seen = collect_inputs(
        model,
        targets,
        calibration,
        lambda: StreamedPCA(max(limits), generator),
        supervised_only=options.eva_supervised_only,
    )
    for target, pca, limit in zip(targets, seen, limits, strict=True):
        _check_rows(target, pca.rows, limit)
    ranks = redistribute(
        [pca.explained[:limit] for pca, limit in zip(seen, limits)], budget=sum(target.rank for target in targets)
    )
    starts = []
    for target, pca, rank in zip(targets, seen, ranks):
        lora_A = pca.vectors[:rank]
        if options.eva_whiten:
            lora_A = lora_A / pca.singular[:rank, None].sqrt()
        lora_B = torch.zeros(target.d_out, rank)
        starts.append(Start(lora_A.cpu().clone(), lora_B, rank=rank, alpha=_alpha(target, rank, config)))
    return starts


def _alpha(target: Target, rank: int, config: AdapterConfig) -> float:
    """Alpha at another rank than the target's, so that the scaling is the same."""
    return alpha_of(rank, _scaling(target, config), config.rslora)


def blank(targets: Sequence[Target], config: AdapterConfig, rows: Mapping[str, int]) -> list[Start]:
    """Starts of zeros, for factors that a checkpoint holds: nothing is computed.

    `rows` says by target name how many rows the checkpoint's lora_A has: the rank, or twice that where it holds [A; A₀].
    """
    starts, each = [], 2 if config.init in _SPECTRAL else 1
    for target in targets:
        rank = rows.get(target.name, 0) // each
        lora_A, lora_B = torch.zeros(rank, target.d_in), torch.zeros(target.d_out, rank)
        starts.append(Start(lora_A, lora_B, config.init in _SPECTRAL, rank, _alpha(target, rank, config)))
    return starts


def _check_rows(target: Target, rows: int, needed: int) -> None:
    if rows < needed:
        raise ConfigError(
            f"{target.name} was given {rows} calibration tokens and {needed} are needed: raise init_options.examples"
        )

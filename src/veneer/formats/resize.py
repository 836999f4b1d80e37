"""Adapters on files: truncate one to a smaller rank, and compare two. Neither needs the base."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter.algebra import factors
from veneer.adapter.algebra.factors import Pair
from veneer.errors import AdapterFormatError, AdapterStateError, ConfigError
from veneer.formats.adapter_file import AdapterFile, Factors, names_of, read_adapter, write_adapter
from veneer.formats.combine import check_bases
from veneer.formats.peft import CONFIG, PROVENANCE, TENSORS

REFUSED = {"use_dora": "DoRA's magnitudes were trained for the whole update"}


@dataclass(frozen=True)
class Resized:
    """What `resize` wrote: each layer's rank before and after and ‖ΔW − ΔW_r‖/‖ΔW‖ (Frobenius), and that of all together."""

    path: Path
    ranks: dict[str, tuple[int, int]]
    errors: dict[str, float]
    error: float

    @property
    def worst(self) -> str:
        """The layer with the largest relative error."""
        return max(self.errors, key=self.errors.__getitem__)


def resize(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    per_layer: bool = False,
) -> Resized:
    """Write an adapter with the best factors of a smaller rank (Eckart–Young, from QR and SVD of the factors).

    `rank`: at most that in each layer. `energy`: the smallest rank that keeps that share of ‖ΔW‖² (0 to 1), one for all
    layers together or, `per_layer`, each layer's own. With both, `rank` is the limit. Scalings, whole modules, biases and
    token rows stay. Raises `AdapterFormatError` (DoRA, nothing to resize), `AdapterStateError` (`out` exists) and
    `ConfigError`.
    """
    path, out = Path(adapter), Path(out)
    check_wanted(rank, energy)
    if per_layer and energy is None:
        raise ConfigError("per_layer gives each layer the rank that an energy share needs: say which energy")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterStateError(f"{out} exists and is not empty: choose another place")
    source = read_adapter(path)
    for key, why in REFUSED.items():
        if source.fields.get(key):
            raise AdapterFormatError(f"{path} has {key}: {why}, so it is not resized")
    if not source.layers:
        raise AdapterFormatError(f"{path} holds no LoRA factors to resize")
    spectra = {name: [factors.svd(pair) for pair in f.pairs()] for name, f in source.layers.items()}
    wanted = _ranks(source, spectra, rank, energy, per_layer)
    layers, lost, whole = {}, {}, {}
    for name, f in source.layers.items():
        pairs = [_cast(_padded(factors.from_svd(*_first(svd, wanted[name])), wanted[name]), f) for svd in spectra[name]]
        layers[name] = f.with_pairs(pairs, f.scaling)
        scale = abs(f.scaling)
        lost[name] = scale * math.hypot(*(factors.distance(new, old) for new, old in zip(pairs, f.pairs())))
        whole[name] = scale * math.hypot(*(float(s.norm()) for _, s, _ in spectra[name]))
    fields = source.fields | {"init_lora_weights": True}
    record = {"rank": rank, "energy": energy, "per_layer": per_layer}
    provenance = source.provenance | {"resized": record} if source.provenance else {}
    write_adapter(replace(source, path=None, fields=fields, layers=layers, provenance=provenance), out)
    for file in path.iterdir():  # the tokenizer of an adapter that brings tokens
        if file.is_file() and file.name not in (CONFIG, TENSORS, PROVENANCE):
            shutil.copyfile(file, out / file.name)
    return Resized(
        out,
        {name: (f.rank, layers[name].rank) for name, f in source.layers.items()},
        {name: _ratio(lost[name], whole[name]) for name in layers},
        _ratio(math.hypot(*lost.values()), math.hypot(*whole.values())),
    )


def check_wanted(rank: int | None, energy: float | None) -> None:
    """Raise `ConfigError` unless a rank or an energy share that can be is given."""
    if rank is None and energy is None:
        raise ConfigError("say how small: a rank, an energy share such as 0.99, or both")
    if rank is not None and rank < 1:
        raise ConfigError("rank must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is a share of ‖ΔW‖² above 0 and up to 1, not {energy}")


def rank_for(squares: Tensor, energy: float) -> int:
    """The fewest of falling σ² whose sum is a share of all; at least 1. 1e-12 of the whole may be rounding."""
    share = squares.cumsum(0) / squares.sum()
    return 1 if not squares.sum() > 0 else min(len(squares), int((share < energy - 1e-12).sum()) + 1)


def _ranks(
    source: AdapterFile, spectra: dict[str, list], rank: int | None, energy: float | None, per_layer: bool
) -> dict[str, int]:
    """Each layer's new rank; one for what PEFT gives one rank."""
    found = {}
    limit = max(f.rank for f in source.layers.values()) if rank is None else rank
    if energy is not None and not per_layer:
        squares = torch.zeros(max(f.rank for f in source.layers.values()), dtype=torch.float64)
        for name, f in source.layers.items():
            for _, s, _ in spectra[name]:
                squares[: len(s)] += (f.scaling * s).square()
        limit = min(limit, rank_for(squares, energy))
    groups: dict[tuple[str, ...], int] = {}
    for name, f in source.layers.items():
        own = (
            max(rank_for(s.square(), energy) for _, s, _ in spectra[name])
            if energy is not None and per_layer
            else limit
        )
        found[name] = min(own, limit, f.rank)
        key = tuple(names_of(name, source.fields))
        groups[key] = max(groups.get(key, 1), found[name])
    return {name: groups[tuple(names_of(name, source.fields))] for name in found}


def _first(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = svd
    return u[:, :rank], s[:rank], v[:, :rank]


def _padded(pair: Pair, rank: int) -> Pair:
    pad, missing = torch.nn.functional.pad, rank - pair[0].shape[0]
    return pad(pair[0], (0, 0, 0, missing)), pad(pair[1], (0, missing))


def _cast(pair: Pair, f: Factors) -> Pair:
    return pair[0].to(f.lora_A.dtype), pair[1].to(f.lora_B.dtype)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0 if not part else math.inf


@dataclass(frozen=True)
class LayerDifference:
    """How the updates ΔW of two adapters compare in one layer (Frobenius norms; of all experts together).

    `cosine` is ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖), `distance` ‖ΔW₁ − ΔW₂‖/‖ΔW₁‖; `inputs` and `outputs` say how much of the
    smaller of the row (column) spaces lies in the other: ‖UᵀV‖²/min(r₁, r₂), 0 to 1 (arXiv:2106.09685, eq. 4).
    """

    name: str
    cosine: float
    distance: float
    norm_a: float
    norm_b: float
    rank_a: int
    rank_b: int
    inputs: float
    outputs: float


@dataclass(frozen=True)
class Difference:
    """What `diff` found: layers that both adapters have, those of one alone, and other tensors that differ."""

    layers: list[LayerDifference]
    only_a: list[str]
    only_b: list[str]
    other: list[str]
    cosine: float
    distance: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready values; what is not defined (a cosine with 0) is None."""
        values = asdict(self)
        for part in (values, *values["layers"]):
            part |= {key: None for key, value in part.items() if isinstance(value, float) and not math.isfinite(value)}
        return values


def diff(a: str | Path, b: str | Path, *, force: bool = False) -> Difference:
    """Compare the updates of two adapters of one base, layer by layer, from their factors in float64.

    Raises `AdapterFormatError` (damaged, layers of different shapes) and `WrongBaseError` (`force` overrides).
    """
    one, two = read_adapter(a), read_adapter(b)
    check_bases([one, two], force)
    both = [name for name in one.layers if name in two.layers]
    parts = [_compare(name, one.layers[name], two.layers[name]) for name in both]
    dots = [cosine * x.norm_a * x.norm_b for x in parts for cosine in [x.cosine] if math.isfinite(cosine)]
    norms = [
        math.hypot(*(_task_norm(f) for f in source.layers.values())) if source.layers else 0.0 for source in (one, two)
    ]
    alone = [[n for n in x.layers if n not in y.layers] for x, y in ((one, two), (two, one))]
    gaps = [x.distance * x.norm_a if x.norm_a else x.norm_b for x in parts]
    gaps += [_task_norm(source.layers[n]) for source, names in zip((one, two), alone) for n in names]
    odd = sorted(
        key
        for key in one.rest.keys() | two.rest.keys()
        if key not in one.rest or key not in two.rest or not torch.equal(one.rest[key], two.rest[key])
    )
    product = norms[0] * norms[1]
    cosine = sum(dots) / product if product else math.nan
    return Difference(parts, *alone, odd, cosine, _ratio(math.hypot(*gaps), norms[0]))


def _tasks(f: Factors) -> list[Pair]:
    return [(lora_A.double(), f.scaling * lora_B.double()) for lora_A, lora_B in f.pairs()]


def _task_norm(f: Factors) -> float:
    return math.hypot(*(factors.norm(pair) for pair in _tasks(f)))


def _compare(name: str, one: Factors, two: Factors) -> LayerDifference:
    mine, other = _tasks(one), _tasks(two)
    shapes = [[(a.shape[1], b.shape[0]) for a, b in pairs] for pairs in (mine, other)]
    if shapes[0] != shapes[1]:
        raise AdapterFormatError(f"{name} has other shapes in the second adapter ({shapes[1][0]}, not {shapes[0][0]})")
    dot = sum(float(((b1.t() @ b2) * (a1 @ a2.t())).sum()) for (a1, b1), (a2, b2) in zip(mine, other))
    norms = _task_norm(one), _task_norm(two)
    gap = math.hypot(*(factors.distance(p, q) for p, q in zip(mine, other)))
    bases = [[_bases(pair) for pair in pairs] for pairs in (mine, other)]
    product = norms[0] * norms[1]
    inputs, outputs = (_overlap([(x[i], y[i]) for x, y in zip(*bases)]) for i in (1, 0))
    cosine = max(-1.0, min(1.0, dot / product)) if product else math.nan
    return LayerDifference(name, cosine, _ratio(gap, norms[0]), *norms, one.rank, two.rank, inputs, outputs)


def _bases(pair: Pair) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column and the row space of B·A, without what is rounding noise of float32."""
    u, s, v = factors.svd(pair)
    k = factors.independent(s, 1e-7)
    return u[:, :k], v[:, :k]


def _overlap(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    smaller = sum(min(x.shape[1], y.shape[1]) for x, y in pairs)
    return sum(float((x.t() @ y).square().sum()) for x, y in pairs) / smaller if smaller else math.nan

"""What training changed: the singular values of each layer's ΔW = s·B·A, and what follows from them.

ΔW is never formed. With B = Q_B R_B and Aᵀ = Q_A R_A (QR, Q with orthonormal columns) its singular values are those of
the small s·R_B R_Aᵀ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterFormatError
from veneer.formats.adapter_file import OUT_PROJ, AdapterFile, Factors, names_of, read_adapter
from veneer.formats.peft import TENSORS
from veneer.plan.weights import weight_norms

ENERGY = 0.99
"""Share of ‖ΔW‖² that counts as keeping an update."""


def singular_values(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """σ of scale·B·A, descending, in float64: lora_A (rank, d_in), lora_B (d_out, rank) → (min(rank, d_in, d_out),)."""
    r_in, r_out = (torch.linalg.qr(m.double(), mode="r").R for m in (lora_A.t(), lora_B))
    return abs(scale) * torch.linalg.svdvals(r_out @ r_in.t())


def entropy_rank(sigma: Tensor) -> float:
    """exp(−Σ p ln p) with p = σ/Σσ: 1 if one direction does all, rank if all do the same, 0 for ΔW = 0.

    The effective rank of Roy and Vetterli 2007 (EUSIPCO, "The effective rank: a measure of effective dimensionality").
    """
    p = sigma[sigma > 0] / sigma.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def stable_rank(sigma: Tensor) -> float:
    """‖ΔW‖_F²/‖ΔW‖₂² = Σσ²/σ₁², 0 for ΔW = 0 (Rudelson and Vershynin 2007, arXiv:math/0503442)."""
    return float((sigma / sigma[0]).square().sum()) if len(sigma) and sigma[0] > 0 else 0.0


def rank_for(energy: Tensor, share: float = ENERGY) -> int:
    """The smallest r′ whose first r′ values of `energy` (σ², descending) hold `share` of their sum; 0 for nothing.

    The best approximation of rank r′ keeps just those (Eckart and Young 1936).
    """
    if not energy.sum() > 0:
        return 0
    return int((energy.cumsum(0) < share * energy.sum() * (1 - 1e-12)).sum()) + 1


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's update. For fused experts (`experts` > 1) singular values are √Σσ² over experts at each place, so that
    energies add up, and the two effective ranks are means."""

    name: str
    rank: int
    d_out: int
    d_in: int
    experts: int
    scaling: float
    norm: float
    weight_norm: float | None
    singular_values: list[float]
    effective_rank: float
    stable_rank: float
    rank_99: int

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖/‖W‖ (Frobenius); None where W is not at hand."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @property
    def used(self) -> float:
        """Effective rank as a share of the rank."""
        return self.effective_rank / self.rank

    @property
    def full_parameters(self) -> int:
        return self.experts * self.d_out * self.d_in

    @property
    def lora_parameters(self) -> int:
        return self.experts * self.rank * (self.d_out + self.d_in)

    def as_dict(self) -> dict[str, Any]:
        more = ("relative_norm", "used", "full_parameters", "lora_parameters")
        reduction = 1 - self.lora_parameters / self.full_parameters
        return asdict(self) | {key: getattr(self, key) for key in more} | {"reduction": reduction}


@dataclass(frozen=True)
class AdapterSpectrum:
    """What `analyse` finds in an adapter; `base` is where W came from, if it was at hand."""

    path: str
    base: str | None
    adapter_bytes: int
    trainable_parameters: int
    layers: list[LayerSpectrum]
    notes: list[str]

    @property
    def norm(self) -> float:
        """‖ΔW‖_F of all layers together."""
        return sum(layer.norm**2 for layer in self.layers) ** 0.5

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖/‖W‖ over the layers whose W is at hand."""
        known = [layer for layer in self.layers if layer.weight_norm]
        whole = sum(layer.weight_norm**2 for layer in known)
        return (sum(layer.norm**2 for layer in known) / whole) ** 0.5 if whole else None

    @property
    def energy_kept(self) -> list[float]:
        """Share of Σ‖ΔW‖² that stays if every layer is cut to rank 1, 2, …"""
        total = self._energy()
        return (total.cumsum(0) / total.sum()).tolist() if total.sum() > 0 else []

    def _energy(self) -> Tensor:
        total = torch.zeros(max(len(layer.singular_values) for layer in self.layers), dtype=torch.float64)
        for layer in self.layers:
            total[: len(layer.singular_values)] += torch.tensor(layer.singular_values, dtype=torch.float64).square()
        return total

    def summary(self) -> dict[str, Any]:
        """The numbers of the adapter as a whole."""
        count, largest = len(self.layers), max(self.layers, key=lambda layer: layer.rank_99)
        return {
            "layers": count,
            "rank": max(layer.rank for layer in self.layers),
            "norm": self.norm,
            "relative_norm": self.relative_norm,
            "mean_effective_rank": sum(layer.effective_rank for layer in self.layers) / count,
            "mean_stable_rank": sum(layer.stable_rank for layer in self.layers) / count,
            "mean_used": sum(layer.used for layer in self.layers) / count,
            "rank_99": rank_for(self._energy()),
            "rank_99_each": largest.rank_99,
            "rank_99_each_layer": largest.name,
        }

    def changed_most(self) -> list[LayerSpectrum]:
        """The layers by how much they changed: by ‖ΔW‖/‖W‖ where every W is at hand, else by ‖ΔW‖."""
        relative = all(layer.weight_norm for layer in self.layers)
        return sorted(self.layers, key=lambda layer: -(layer.relative_norm if relative else layer.norm))

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {
            "summary": self.summary(),
            "energy_kept": self.energy_kept,
            "layers": [layer.as_dict() for layer in self.layers],
        }


def analyse(adapter: str | Path, base: str | None = None, revision: str | None = None) -> AdapterSpectrum:
    """The spectrum of every layer of an adapter directory, and its size beside W's with a `base`: a directory, or a name
    of the catalogue or the hub that was fetched before; one tensor at a time is read.

    Raises `AdapterFormatError` (damaged, nothing low-rank in it, grouped convolutions), `BaseModelError` (`base` has no
    safetensors) and `WrongBaseError` (none of its tensors fits).
    """
    path = Path(adapter)
    file = read_adapter(path)
    layers = {_name(key, file): factors for key, factors in file.layers.items()}
    if not layers:
        raise AdapterFormatError(f"{path} has no low-rank factors to look at")
    norms = weight_norms({name: _numel(f) for name, f in layers.items()}, base, revision) if base else {}
    numbers = sum(f.lora_A.numel() + f.lora_B.numel() for f in file.layers.values())
    return AdapterSpectrum(
        path=str(path),
        base=base,
        adapter_bytes=(path / TENSORS).stat().st_size,
        trainable_parameters=numbers + sum(value.numel() for value in file.rest.values()),
        layers=[_layer(name, factors, norms.get(name)) for name, factors in layers.items()],
        notes=_notes(file, layers, norms, base),
    )


def _numel(factors: Factors) -> int:
    """How many numbers the W of a layer has."""
    lora_A, lora_B = factors.pairs()[0]
    return factors.experts * lora_A.shape[1] * lora_B.shape[0]


def _layer(name: str, factors: Factors, weight_norm: float | None) -> LayerSpectrum:
    each = [singular_values(lora_A, lora_B, factors.scaling) for lora_A, lora_B in factors.pairs()]
    energy = torch.stack(each).square().sum(0)
    (rank, d_in), d_out = factors.pairs()[0][0].shape, factors.pairs()[0][1].shape[0]
    return LayerSpectrum(
        name=name,
        rank=rank,
        d_out=d_out,
        d_in=d_in,
        experts=factors.experts,
        scaling=factors.scaling,
        norm=float(energy.sum().sqrt()),
        weight_norm=weight_norm,
        singular_values=energy.sqrt().tolist(),
        effective_rank=sum(map(entropy_rank, each)) / len(each),
        stable_rank=sum(map(stable_rank, each)) / len(each),
        rank_99=rank_for(energy),
    )


def _name(path: str, file: AdapterFile) -> str:
    """A layer's name in the model. Of several parameters of one module, the n-th last stands behind n .base_layer."""
    names = names_of(path, file.fields)
    if len(names) == 1:
        return names[0] if not path.endswith(OUT_PROJ) else f"{names[0]}.out_proj"
    return names[-1 - path.count(".base_layer")]


def _notes(file: AdapterFile, layers: dict[str, Factors], norms: dict[str, float], base: str | None) -> list[str]:
    notes = []
    if file.fields.get("use_dora"):
        notes.append("DoRA: spectra are of s·B·A, before the rows of W + s·B·A get their trained norms")
    rest = [key for key in file.rest if not key.endswith("lora_magnitude_vector")]
    if rest:
        numbers = sum(file.rest[key].numel() for key in rest)
        notes.append(f"{len(rest)} tensors ({numbers:,} numbers) are trained whole and have no low rank to look at")
    if not base:
        notes.append("no weights of the base at hand: ‖ΔW‖/‖W‖ needs --base")
    elif len(norms) < len(layers):
        notes.append(f"‖W‖ of {len(layers) - len(norms)} layers is not in {base}")
    if not any(bool(factors.lora_B.any()) for factors in layers.values()):
        notes.append("ΔW is 0 everywhere: the adapter is not trained")
    return notes

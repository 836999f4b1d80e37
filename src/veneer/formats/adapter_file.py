"""An adapter in memory without a model: read a PEFT directory, compute with its factors, write one; lossless both ways."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from veneer.adapter import math
from veneer.adapter.attach import get_bank
from veneer.adapter.slot import swap
from veneer.adapter.targets import matches_pattern
from veneer.errors import AdapterFormatError, AdapterStateError
from veneer.files import new_directory
from veneer.formats.peft import (
    CONFIG,
    PROVENANCE,
    TENSORS,
    check_base,
    check_values,
    read_config,
    read_provenance,
    read_tensors,
    write_json,
)
from veneer.formats.peft_config import as_patterns
from veneer.formats.peft_tensors import PREFIX
from veneer.formats.peft_tokens import without_lora

FACTOR = re.compile(r"(?P<path>.+)\.(?:lora_(?P<leaf>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
OUT_PROJ = ".base_layer.out_proj"
"""Ends the path of an attention's output projection, to which PEFT adds the update twice (see `formats.peft_tensors`)."""


@dataclass(frozen=True)
class Factors:
    """One layer's ΔW = scaling · lora_B · lora_A, in the shapes and dtype of the file.

    Linear: lora_A (rank, d_in), lora_B (d_out, rank). Convolution: (rank, c_in, *kernel), (c_out, rank, 1, …).
    Embedding: (rank, vocabulary), (dim, rank); its ΔW is transposed in the model. Fused experts: `experts` > 1,
    lora_A (rank·E, d_in) with an expert's rows together, lora_B (d_out, rank·E) with the experts innermost.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    embedding: bool = False
    experts: int = 1

    @property
    def rank(self) -> int:
        """Rank of each expert's update."""
        return self.lora_A.shape[0] // self.experts

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) as matrices (rank, d_in), (d_out, rank), one pair for each expert. Views, not copies."""
        lora_A, lora_B = self.lora_A.flatten(1), self.lora_B.flatten(1)
        if self.experts == 1:
            return [(lora_A, lora_B)]
        rows = lora_A.unflatten(0, (self.experts, -1))
        return list(zip(rows.unbind(0), lora_B.unflatten(1, (-1, self.experts)).unbind(2)))

    def with_pairs(self, pairs: list[tuple[Tensor, Tensor]], scaling: float) -> Factors:
        """The same kind of layer with other matrices, of one rank for all experts, at another scaling."""
        if self.experts > 1:
            lora_A, lora_B = torch.cat([a for a, _ in pairs]), torch.stack([b for _, b in pairs], 2).flatten(1)
        else:
            ((lora_A, lora_B),) = pairs
        lora_A = lora_A.reshape(lora_A.shape[0], *self.lora_A.shape[1:])
        lora_B = lora_B.reshape(*lora_B.shape, *self.lora_B.shape[2:])
        return replace(self, lora_A=lora_A, lora_B=lora_B, scaling=scaling)


@dataclass
class AdapterFile:
    """An adapter's files. `layers` by PEFT's module path without the prefix, `rest` by the key in the file."""

    path: Path | None
    fields: dict[str, Any]
    """adapter_config.json."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """veneer.json, or empty."""
    layers: dict[str, Factors] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    """All that is no factor: magnitudes, biases, token rows, whole modules."""


def read_adapter(path: str | Path, mapped: bool = True) -> AdapterFile:
    """Read an adapter directory, PEFT's or Veneer's. Raises `AdapterFormatError` (damaged, not a LoRA, odd shapes).

    `mapped` as in `formats.peft.read_tensors`.
    """
    path = Path(path)
    fields = read_config(path)
    found: dict[str, dict[str, Tensor]] = {}
    embeddings, rest = set(), {}
    for key, value in read_tensors(path, mapped).items():
        match = FACTOR.fullmatch(key)
        if match is None:
            rest[PREFIX + key] = value
            continue
        found.setdefault(match["path"], {})[match["leaf"] or match["embedding"]] = value
        embeddings |= {match["path"]} if match["embedding"] else set()
    layers = {name: _factors(path, name, pair, fields, name in embeddings) for name, pair in found.items()}
    if not (layers or rest):
        raise AdapterFormatError(f"{path / TENSORS} holds no tensor")
    return AdapterFile(path, fields, read_provenance(path), layers, rest)


def write_adapter(adapter: AdapterFile, out: str | Path) -> Path:
    """Write an adapter directory in one atomic step; one that stands there is replaced.

    r, lora_alpha and the patterns stay if they give each layer its rank and scaling, and are made anew otherwise, with
    use_rslora and all other fields (target_modules too) as they are in `adapter.fields`. A scaling of 0 or below goes
    into lora_B. Raises `AdapterFormatError` (parameters of one module with different ranks) and `RunError` (disk).
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and ((out / CONFIG).exists() or not any(out.iterdir()))):
        raise AdapterStateError(f"{out} exists and is no adapter directory: choose another place")
    layers = {name: _writable(name, f, adapter.layers) for name, f in adapter.layers.items()}
    fields = with_ranks(adapter.fields, layers)
    tensors = dict(adapter.rest)
    for name, f in layers.items():
        leaves = ("lora_embedding_A", "lora_embedding_B") if f.embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{name}.{leaf}": value for leaf, value in zip(leaves, (f.lora_A, f.lora_B))}
    tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    if broken := next((key for key, value in tensors.items() if not value.isfinite().all()), None):
        dtype = str(tensors[broken].dtype).removeprefix("torch.")
        raise AdapterFormatError(f"the result is beyond {dtype} at {broken.removeprefix(PREFIX)}: nothing was written")
    if not layers and fields.get("trainable_token_indices"):
        fields, tensors = without_lora({"target_modules": [], "target_parameters": None} | fields, tensors, None)
    with new_directory(out) as folder:
        write_json(folder / CONFIG, fields, sort_keys=True)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        if adapter.provenance:
            write_json(folder / PROVENANCE, adapter.provenance)
    return out


def names_of(path: str, fields: Mapping[str, Any]) -> list[str]:
    """The names by which PEFT looks up a layer's rank and alpha: its own; or for parameters of a module, theirs."""
    plain = path.removesuffix(OUT_PROJ).replace(".base_layer", "")
    own = [(f"{plain}.{entry.rpartition('.')[2]}", entry) for entry in fields.get("target_parameters") or ()]
    return list(dict.fromkeys(n for n, entry in own if n == entry or n.endswith(f".{entry}"))) or [plain]


def rank_and_scaling(path: str, fields: Mapping[str, Any]) -> tuple[int, float]:
    """The rank and the effective scaling that adapter_config.json gives a layer."""
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    found = {
        (
            next((r for key, r in ranks.items() if matches_pattern(key, name)), fields.get("r", 8)),
            next((a for key, a in alphas.items() if matches_pattern(key, name)), fields.get("lora_alpha", 8)),
        )
        for name in names_of(path, fields)
    }
    if len(found) > 1:
        raise AdapterFormatError(f"the patterns give the adapted parameters of {path} different ranks or alphas")
    rank, alpha = found.pop()
    scaling = math.scaling(rank, alpha, fields.get("use_rslora") or False)
    return rank, scaling * (2 if path.endswith(OUT_PROJ) else 1)


def with_ranks(fields: Mapping[str, Any], layers: Mapping[str, Factors]) -> dict[str, Any]:
    """adapter_config.json's fields with r, lora_alpha and patterns that give each layer its rank and scaling."""
    new = copy.deepcopy(dict(fields))
    if all(_close(rank_and_scaling(path, new), (f.rank, f.scaling)) for path, f in layers.items()):
        return new
    wanted: dict[str, tuple[int, float]] = {}
    for path, f in layers.items():
        if path.endswith(OUT_PROJ) and path.removesuffix(OUT_PROJ) in layers:
            continue  # has its attention's
        alpha = math.alpha_of(f.rank, f.scaling, new.get("use_rslora") or False)
        for name in names_of(path, new):
            if not _close(wanted.setdefault(name, (f.rank, alpha)), (f.rank, alpha)):
                raise AdapterFormatError(f"the adapted parameters of {path} have different ranks or scalings")
    return new | dict(zip(("r", "lora_alpha", "rank_pattern", "alpha_pattern"), as_patterns(wanted)))


def _factors(source: Path, name: str, pair: dict[str, Tensor], fields: dict[str, Any], embedding: bool) -> Factors:
    if pair.keys() != {"A", "B"}:
        raise AdapterFormatError(f"{source}: {name} lacks lora_{'B' if 'A' in pair else 'A'}")
    (lora_A, lora_B), (rank, scaling) = (pair["A"], pair["B"]), rank_and_scaling(name, fields)
    parameter = names_of(name, fields) != [name.removesuffix(OUT_PROJ).replace(".base_layer", "")]
    rows, columns = len(lora_A) if lora_A.ndim else 0, lora_B.shape[1] if lora_B.ndim > 1 else 0
    experts = rows // rank if parameter else 1
    if lora_A.ndim < 2 or rows != rank * experts or columns == 0 or rows % columns or lora_A.ndim != lora_B.ndim:
        raise AdapterFormatError(
            f"{source}: {name} has factors {tuple(lora_A.shape)} and {tuple(lora_B.shape)}, its rank is {rank}"
        )
    if columns != rows:
        raise AdapterFormatError(f"{source}: {name} is a grouped convolution, whose ΔW is no product of its factors")
    check_values(lora_A, f"{name}.lora_A", source), check_values(lora_B, f"{name}.lora_B", source)
    return Factors(lora_A, lora_B, scaling, embedding, experts)


def _writable(name: str, f: Factors, layers: Mapping[str, Factors]) -> Factors:
    """The same ΔW with a positive scaling; for an attention's output projection, with the rank and scaling it gets."""
    owner = layers.get(name.removesuffix(OUT_PROJ)) if name.endswith(OUT_PROJ) else None
    if owner is None:
        return f if f.scaling > 0 else replace(f, lora_B=f.lora_B * f.scaling, scaling=1.0)
    if f.rank != owner.rank:
        raise AdapterFormatError(f"{name} has rank {f.rank} and its attention {owner.rank}: PEFT has one rank for both")
    scaling = 2 * (owner.scaling if owner.scaling > 0 else 1.0)
    return f if f.scaling == scaling else replace(f, lora_B=f.lora_B * (f.scaling / scaling), scaling=scaling)


def _close(one: tuple[int, float], other: tuple[int, float]) -> bool:
    return one[0] == other[0] and abs(one[1] - other[1]) <= 1e-12 * abs(other[1])


def swap_adapter(model: nn.Module, path: str | Path, *, name: str = "default", force: bool = False) -> None:
    """Exchange the factors of a live slot (`veneer.reserve`) for those of an adapter directory, in place.

    Raises `AdapterStateError` (no slot, a rank or target beyond it, an adapter that is more than factors) and what
    `read_adapter` and `check_base` raise.
    """
    bank, adapter = get_bank(model), read_adapter(path)
    check_base(model, Path(path), force)
    if adapter.rest or adapter.fields.get("use_dora") or adapter.fields.get("alora_invocation_tokens"):
        raise AdapterStateError(f"{path} is more than lora_A and lora_B: load it beside the slot (veneer.load_adapter)")
    swap(bank, name, {path: (f.lora_A, f.lora_B, f.scaling) for path, f in adapter.layers.items()})

"""Combine adapters into one, files in and files out, without their base."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter.algebra import METHODS, Merged, Plan, Term, factors, plan
from veneer.adapter.algebra import combine as combine_layer
from veneer.adapter.targets import matches_pattern
from veneer.base.fingerprint import Fingerprint, mismatch
from veneer.base.load import pick_device
from veneer.config import read_yaml
from veneer.errors import AdapterFormatError, AdapterStateError, ConfigError, WrongBaseError
from veneer.formats.adapter_file import AdapterFile, Factors, names_of, read_adapter, write_adapter
from veneer.formats.peft import CONFIG, TENSORS
from veneer.formats.peft_config import adapter_config
from veneer.version import __version__

Weights = Sequence[float] | Mapping[str, Sequence[float]] | None
REFUSED = {
    "use_dora": "DoRA's magnitudes belong to one adapter and do not add up",
    "lora_bias": "a trained bias of lora_B is not combined",
    "ensure_weight_tying": "factors shared by an embedding and its tied head are not combined",
}
SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")


@dataclass(frozen=True)
class LayerResult:
    """One layer of a combination: its rank, and ‖result − Σ w_i ΔW_i‖_F and ‖Σ w_i ΔW_i‖_F.

    `lost` is the relative error of truncating what the method gave to that rank.
    """

    name: str
    rank: int
    distance: float
    size: float
    lost: float

    @property
    def error(self) -> float:
        """Relative error against the weighted sum; infinite where that is 0 and the result is not."""
        return _ratio(self.distance, self.size)


@dataclass(frozen=True)
class CombineReport:
    """What `combine` wrote, and how far it is from the exact weighted sum Σ w_i ΔW_i."""

    path: Path | None
    plan: Plan
    sources: list[str]
    layers: list[LayerResult]
    parameters: int
    bytes: int
    """Of the factors as stored."""

    @property
    def error(self) -> float:
        """‖result − Σ w_i ΔW_i‖_F / ‖Σ w_i ΔW_i‖_F over all layers together, from the factors as they are stored."""
        return _ratio(math.hypot(*(r.distance for r in self.layers)), math.hypot(*(r.size for r in self.layers)))

    @property
    def worst(self) -> LayerResult:
        """The layer with the largest relative error."""
        return max(self.layers, key=lambda layer: layer.error)

    @property
    def ranks(self) -> str:
        """The rank, or its range over the layers."""
        low, high = min(r.rank for r in self.layers), max(r.rank for r in self.layers)
        return str(low) if low == high else f"{low} to {high}"

    def __str__(self) -> str:
        p = self.plan
        settings = {
            k: v for k, v in asdict(p).items() if k not in ("method", "scale", "rank", "seed") and v is not None
        }
        settings |= {"scale": p.scale} if p.scale != 1 else {}
        settings |= {"seed": p.seed} if METHODS[p.method].random else {}
        lost = max(r.lost for r in self.layers)
        lines = [
            f"adapter        {self.path}" if self.path else "",
            f"method         {', '.join([p.method, *(f'{k} {v}' for k, v in settings.items())])}",
            f"size           {len(self.layers)} layers, rank {self.ranks}, {self.parameters:,} parameters, "
            f"{self.bytes / 2**20:,.1f} MiB",
            f"against the weighted sum: relative error {self.error:.2e}, worst {self.worst.error:.2e} in {self.worst.name}",
            f"  truncating to this rank lost up to {lost:.1%} of a layer of what {p.method} gave"
            if lost > 1e-6
            else "",
        ]
        return "\n".join(line for line in lines if line)


def combine(
    adapters: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    weights: Weights = None,
    method: str = "cat",
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> CombineReport:
    """Combine adapter directories into a new one at `out` (None: compute and report only).

    `weights`: one number for each adapter, or {pattern over layer names: numbers}, of which the first that matches
    holds; 1 each when absent. `settings`: rank, space, like, density, gamma, epsilon, scale, seed (`algebra.plan`).
    `progress(done, all)` counts layers. The inputs are only read. Raises `ConfigError` (settings), `AdapterFormatError`
    (damaged, shapes that do not fit, what cannot be combined), `WrongBaseError` (different bases; `force` overrides),
    `AdapterStateError` (`out` exists).
    """
    chosen = plan(method, **settings)
    if isinstance(adapters, (str, Path)):
        raise ConfigError(f"adapters is a list of directories, not {str(adapters)!r}")
    out = Path(out) if out is not None else None
    if out is not None:
        check_free(out)
    sources = [read_adapter(path) for path in adapters]
    check_bases(sources, force)
    result, report = combine_files(sources, chosen, weights, dtype=dtype, device=device, progress=progress)
    if out is None:
        return report
    result.provenance["combined"]["sources"] = [source_record(source.path) for source in sources]
    write_adapter(result, out)
    return replace(report, path=out)


def check_free(out: Path) -> None:
    """Raise `AdapterStateError` where something stands at `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterStateError(f"{out} exists and is not empty: choose another place")


def combine_files(
    sources: Sequence[AdapterFile],
    chosen: Plan,
    weights: Weights = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[AdapterFile, CombineReport]:
    """`combine` on adapters in memory, which are not changed; an adapter that lacks a layer adds 0 to it."""
    check_combinable(sources)
    names = list(dict.fromkeys(name for source in sources for name in source.layers))
    by_layer = layer_weights(weights, names, len(sources))
    place = "cpu" if device == "auto" and not torch.cuda.is_available() else pick_device(device)
    if place == "mps":
        raise ConfigError("combining computes in float64, which mps lacks: use device cpu")
    found: dict[str, list[Merged]] = {}
    sums: dict[str, list[factors.Pair]] = {}
    for done, name in enumerate(names):
        if progress:
            progress(done, len(names))
        parts = _parts(sources, name, by_layer[name], place)
        found[name], sums[name] = [], []
        for i, terms in enumerate(parts):
            merged = combine_layer(terms, chosen, key=f"{name} {i}" if len(parts) > 1 else name)
            found[name].append(Merged(merged.lora_A.to(dtype), merged.lora_B.to(dtype), merged.lost))
            sums[name].append(factors.total(terms))
    fields = _fields(sources, names)
    ranks: dict[tuple[str, ...], int] = {}
    for name, parts in found.items():  # one rank for what PEFT gives one rank
        key = tuple(names_of(name, fields))
        ranks[key] = max([ranks.get(key, 1), *(part.lora_A.shape[0] for part in parts)])
    layers, results = {}, []
    for name, parts in found.items():
        pairs = [_padded(part, ranks[tuple(names_of(name, fields))]) for part in parts]
        results.append(_measured(name, pairs, sums[name], max(part.lost for part in parts)))
        like = next(source.layers[name] for source in sources if name in source.layers)
        layers[name] = like.with_pairs([(a.cpu(), b.cpu()) for a, b in pairs], 1.0)
    factor_tensors = [t for f in layers.values() for t in (f.lora_A, f.lora_B)]
    parameters = sum(t.numel() for t in factor_tensors)
    size = sum(t.numel() * t.element_size() for t in factor_tensors)
    labels = [str(source.path or i) for i, source in enumerate(sources)]
    report = CombineReport(None, chosen, labels, results, parameters, size)
    provenance = _provenance(sources, fields, chosen, weights, report)
    return AdapterFile(None, fields, provenance, layers, dict(sources[0].rest)), report


def parse_weights(text: str | None) -> Weights:
    """Weights as the command line takes them: "0.7,0.3", or a YAML or JSON file {pattern: [0.7, 0.3]}."""
    if text is None:
        return None
    if Path(text).suffix.lower() in (".yaml", ".yml", ".json"):
        return read_yaml(text, "weights by layer, {pattern: [one number for each adapter]}")
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights takes numbers such as 0.7,0.3 or a .yaml or .json file, not {text!r}") from None


def layer_weights(weights: Weights, names: Sequence[str], count: int) -> dict[str, list[float]]:
    """Each layer's weights. Raises `ConfigError`: wrong number, a layer that no pattern matches, a pattern for nothing."""
    if weights is None:
        weights = [1.0] * count
    patterns = weights if isinstance(weights, Mapping) else {".*": weights}
    for pattern, values in patterns.items():
        if not (isinstance(values, Sequence) and len(values) == count) or isinstance(values, str):
            raise ConfigError(f"weights {values!r} are not one number for each of the {count} adapters")
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
            raise ConfigError(f"weights {values!r} are not finite numbers")
        if not any(matches_pattern(pattern, name) for name in names):
            raise ConfigError(
                f"weights pattern {pattern!r} matches no layer to its name's end, first of which is {names[0]}"
            )
    found = {}
    for name in names:
        hit = next((pattern for pattern in patterns if matches_pattern(pattern, name)), None)
        if hit is None:
            raise ConfigError(
                f"no weights for {name}: end the file with '.*': [{', '.join(['1'] * count)}] for the rest"
            )
        found[name] = [float(value) for value in patterns[hit]]
    return found


def check_bases(sources: Sequence[AdapterFile], force: bool = False) -> None:
    """Refuse adapters of different bases, by fingerprint, or by name where one has none. Raises `WrongBaseError`."""
    for one, other in [] if force else combinations(sources, 2):
        marks = [(source.provenance.get("base") or {}).get("fingerprint") for source in (one, other)]
        bases = [source.fields.get("base_model_name_or_path") for source in (one, other)]
        if all(marks):
            reason = mismatch(*(Fingerprint.from_dict(mark) for mark in marks))
        else:
            reason = f"{bases[0]} and {bases[1]}" if all(bases) and bases[0] != bases[1] else None
        if reason:
            raise WrongBaseError(
                f"{one.path} and {other.path} are of different bases: {reason}; pass force=True (--force) to use them "
                f"all the same"
            )


def check_combinable(sources: Sequence[AdapterFile]) -> None:
    """Raise `AdapterFormatError` for what no weighted sum of low-rank updates can hold."""
    if not sources:
        raise ConfigError("there is no adapter to combine")
    first = sources[0]
    for source in sources:
        for key, why in REFUSED.items():
            if source.fields.get(key):
                raise AdapterFormatError(f"{source.path} has {key}: {why}")
        for key in ("alora_invocation_tokens", "target_parameters"):
            if _as_set(source.fields.get(key)) != _as_set(first.fields.get(key)):
                raise AdapterFormatError(
                    f"{first.path} and {source.path} differ in {key}: they cannot become one adapter"
                )
        if _new_tokens(source) != _new_tokens(first):
            raise AdapterFormatError(
                f"{first.path} and {source.path} add different tokens: they cannot become one adapter"
            )
        odd = [k for k in first.rest.keys() | source.rest.keys() if not _same(first.rest.get(k), source.rest.get(k))]
        if odd:
            raise AdapterFormatError(
                f"{first.path} and {source.path} differ in {len(odd)} tensors that are no LoRA factors (whole modules, "
                f"biases or token rows), first {min(odd)}: those cannot be combined"
            )
    if not any(source.layers for source in sources):
        raise AdapterFormatError("the adapters hold no LoRA factors")


def source_record(path: Path) -> dict[str, Any]:
    """Where a source was and the SHA-256 of its files."""
    hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in (CONFIG, TENSORS)}
    return {"path": str(path), "sha256": hashes}


def _parts(sources: Sequence[AdapterFile], name: str, weights: list[float], place: str) -> list[list[Term]]:
    """The terms of each expert of a layer; one list for any other kind."""
    mine = [(source, source.layers[name], w) for source, w in zip(sources, weights) if name in source.layers]
    first = mine[0][1]
    for source, f, _ in mine[1:]:
        if _shapes(f) != _shapes(first):
            raise AdapterFormatError(
                f"{name} is {_shapes(first)} in {mine[0][0].path} and {_shapes(f)} in {source.path}: different bases?"
            )
    return [
        [Term(a.to(place), b.to(place), f.scaling, w) for (_, f, w), (a, b) in zip(mine, pairs)]
        for pairs in zip(*(f.pairs() for _, f, _ in mine))
    ]


def _shapes(f: Factors) -> tuple[Any, ...]:
    """What must agree: inputs, outputs, kind."""
    kind = "embedding" if f.embedding else "experts" if f.experts > 1 else "layer"
    return kind, f.experts, tuple(f.lora_A.shape[1:]), f.lora_B.shape[0]


def _padded(part: Merged, rank: int) -> factors.Pair:
    missing = rank - part.lora_A.shape[0]
    pad = torch.nn.functional.pad
    return pad(part.lora_A, (0, 0, 0, missing)), pad(part.lora_B, (0, missing))


def _measured(name: str, pairs: list[factors.Pair], sums: list[factors.Pair], lost: float) -> LayerResult:
    """A layer's record; what float64 leaves of parts that cancel out counts as 0."""
    distance = math.hypot(*(factors.distance(pair, wanted) for pair, wanted in zip(pairs, sums)))
    size = math.hypot(*map(factors.norm, sums))
    noise = factors.NEGLIGIBLE * math.hypot(*(float(a.norm() * b.norm()) for a, b in sums))
    distance, size = (0.0 if value <= noise else value for value in (distance, size))
    return LayerResult(name, pairs[0][0].shape[0], distance, size, lost)


def _fields(sources: Sequence[AdapterFile], names: list[str]) -> dict[str, Any]:
    """The first source's fields without what the scalings came from; every layer by name unless all select the same."""
    first = sources[0]
    fields = first.fields | {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    fields |= {"lora_dropout": 0.0, "init_lora_weights": True}
    alike = all(
        source.layers.keys() == first.layers.keys()
        and all(_as_set(source.fields.get(key)) == _as_set(first.fields.get(key)) for key in SELECTING)
        for source in sources
    )
    if alike:
        return fields
    own = {found[0] for name in names if len(found := names_of(name, fields)) == 1 and not _is_parameter(name, fields)}
    return fields | dict.fromkeys(SELECTING[1:4]) | {"target_modules": sorted(own)}


def _is_parameter(name: str, fields: Mapping[str, Any]) -> bool:
    return names_of(name, fields) != names_of(name, {})


def _provenance(
    sources: Sequence[AdapterFile], fields: dict[str, Any], chosen: Plan, weights: Weights, report: CombineReport
) -> dict[str, Any]:
    base = next((s.provenance["base"] for s in sources if s.provenance.get("base")), None)
    base = base or {"name_or_path": fields.get("base_model_name_or_path"), "quant": None, "fingerprint": None}
    config = adapter_config(fields | {"r": report.layers[0].rank}, "the combination")
    config = config.model_copy(update={"new_tokens": _new_tokens(sources[0])})
    used = dict(weights) if isinstance(weights, Mapping) else list(weights or [1.0] * len(sources))
    combined = asdict(chosen) | {"weights": used, "sources": report.sources, "relative_error": report.error}
    return {"format": 1, "veneer": __version__, "base": base, "config": config.model_dump(), "combined": combined}


def _new_tokens(source: AdapterFile) -> list[str]:
    return list((source.provenance.get("config") or {}).get("new_tokens") or [])


def _as_set(value: Any) -> Any:
    return (frozenset(value) if isinstance(value, (list, set, tuple)) else value) or None


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _ratio(distance: float, size: float) -> float:
    return distance / size if size else math.inf if distance else 0.0

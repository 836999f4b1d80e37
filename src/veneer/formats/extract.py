"""Extract an adapter from a fine-tuned checkpoint: the best low-rank ΔW of each linear, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.algebra import factors
from veneer.adapter.frozen import is_conv1d
from veneer.adapter.init.spectral import low_rank_svd
from veneer.adapter.math import wide
from veneer.adapter.targets import base_parameters, candidates, kind_of, output_head, short_form
from veneer.adapter.task import task_type
from veneer.base.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from veneer.base.mapped import map_model
from veneer.base.quant import stored_method
from veneer.config import AdapterConfig
from veneer.errors import AdapterStateError, BaseModelError
from veneer.formats.adapter_file import AdapterFile, Factors, write_adapter
from veneer.formats.peft import base_record
from veneer.formats.peft_tensors import PREFIX
from veneer.formats.resize import check_wanted, rank_for
from veneer.version import __version__

EXACT = 1024
"""Smaller dimension up to which the SVD is exact; above it is a randomised one, as long as it needs few directions."""
OVERSAMPLING = 16


@dataclass
class Extracted:
    """What `extract` wrote. `ranks` and `errors` (‖ΔW − B·A‖/‖ΔW‖, Frobenius) by layer, `error` of all layers together.

    `unchanged` counts linears that are as in the base. `kept` names what was taken whole, `left` what changed and is in no
    adapter; `unread` what neither could be compared.
    """

    path: Path
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0
    unchanged: int = 0
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def extract(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    save_modules: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Extracted:
    """Write the adapter that is nearest to `tuned` − `base`; both are read tensor by tensor.

    Each linear gets `rank`, or the smallest rank that keeps the share `energy` of ‖ΔW‖² (at most `rank` with both).
    Embeddings, norms and biases that changed are left out and named, or with `save_modules` taken whole (modules_to_save,
    bias). Raises `BaseModelError` (other architecture or shapes, no safetensors, quantised), `ConfigError` and
    `AdapterStateError` (`out` exists).
    """
    out = Path(out)
    check_wanted(rank, energy)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterStateError(f"{out} exists and is not empty: choose another place")
    (old, old_files), (new, new_files) = _open(base), _open(tuned)
    if type(old) is not type(new):
        raise BaseModelError(f"{tuned} is a {type(new).__name__} and {base} a {type(old).__name__}: name its own base")
    before, after = base_parameters(old), base_parameters(new)
    linears = {n: m for n, m in candidates(old).items() if kind_of(m) == "linear" and not _tied(old, m)}
    found, layers, lost, whole = Extracted(out), {}, [], []
    changed: list[str] = []
    seen: set[int] = set()
    for name, weight in before.items():
        if name not in after or after[name].shape != weight.shape:
            theirs = tuple(after[name].shape) if name in after else "missing"
            raise BaseModelError(
                f"{name} is {tuple(weight.shape)} in {base} and {theirs} in {tuned}: name its own base"
            )
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        if weight.is_meta or after[name].is_meta:
            found.unread.append(name)
            continue
        path = name.removesuffix(".weight")
        if torch.equal(weight, after[name].to(weight.dtype)):
            found.unchanged += path in linears
        elif path in linears:
            say(path)
            change = wide(after[name]) - wide(weight)
            change = change.t() if is_conv1d(linears[path]) else change
            pair = low_rank(change, rank, energy)
            layers[path] = Factors(*(f.to(torch.float32).contiguous() for f in pair), 1.0)
            size, miss = float(change.norm()), _residual(change, layers[path])
            found.ranks[path], found.errors[path] = layers[path].rank, miss / size
            lost.append(miss), whole.append(size)
        else:
            changed.append(name)
        old_files.forget(), new_files.forget()
    if not layers:
        raise BaseModelError(f"no linear of {tuned} differs from {base}: there is nothing to extract")
    found.error = math.hypot(*lost) / math.hypot(*whole)
    kept, rest, bias = _whole(old, after, changed, layers) if save_modules else ([], {}, "none")
    found.kept, found.left = (changed, []) if save_modules else ([], changed)
    record = {"from": str(tuned), "rank": rank, "energy": energy, "error": found.error}
    config = AdapterConfig(target_modules=list(layers)).model_dump()
    provenance = {"format": 1, "veneer": __version__, "base": base_record(old), "config": config, "extracted": record}
    fields = _fields(old, str(base), list(layers), kept, bias)
    write_adapter(AdapterFile(None, fields, provenance, layers, rest), out)
    return found


def low_rank(change: Tensor, rank: int | None, energy: float | None) -> factors.Pair:
    """(A, B) of the best approximation of a matrix (d_out, d_in) of a rank, or one that keeps an energy share of it.

    Exact for a smaller dimension up to `EXACT`, else randomised (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4) with
    twice the directions until they hold the share.
    """
    small, total = min(change.shape), float(change.double().square().sum())
    limit = min(rank or small, small)
    generator = torch.Generator().manual_seed(0)
    q = limit if energy is None else min(limit, 32)
    while True:
        if small <= EXACT or q + OVERSAMPLING > small // 4:
            u, s, vh = torch.linalg.svd(change, full_matrices=False)
        else:
            u, s, vh = low_rank_svd(change, q + OVERSAMPLING, 4, generator)
        squares = s.double().square()
        if len(s) == small or q >= limit or energy is None or float(squares[:q].sum()) >= energy * total:
            break
        q = min(2 * q, limit)
    k = limit
    if energy is not None:
        unseen = max(0.0, total - float(squares.sum())) if len(s) < small else 0.0
        k = min(limit, rank_for(torch.cat([squares, squares.new_tensor([unseen])]), energy), len(s))
    return factors.from_svd(u[:, :k], s[:k], vh[:k].t())


def _residual(change: Tensor, f: Factors) -> float:
    """‖ΔW − B·A‖ by blocks of rows."""
    rows = range(0, change.shape[0], 1024)
    return math.hypot(*(float((change[i : i + 1024] - f.lora_B[i : i + 1024] @ f.lora_A).norm()) for i in rows))


def _open(name: str | Path) -> tuple[Any, Checkpoint]:
    folder = find_checkpoint(name)
    if folder is None:
        raise BaseModelError(f"{name} is no safetensors checkpoint: convert it first")
    if stored_method(str(folder)):
        raise BaseModelError(f"{name} is stored quantised: an adapter is extracted from float weights")
    files = open_checkpoint(folder)
    return map_model(files, name)[0], files


def _tied(model: Any, module: nn.Module) -> bool:
    embedding = model.get_input_embeddings()
    return module is output_head(model) and embedding is not None and module.weight is embedding.weight


def _whole(
    model: Any, after: dict[str, nn.Parameter], changed: list[str], layers: dict[str, Factors]
) -> tuple[list[str], dict[str, Tensor], str]:
    """(modules_to_save, tensors by the file's keys, bias) for parameters that changed and are no linear's weight."""
    modules, bias = [], "none"
    for name in changed:
        path, _, leaf = name.rpartition(".")
        if path in layers or leaf == "bias" and kind_of(model.get_submodule(path)) == "linear":
            bias = "all"
        elif path not in modules:
            modules.append(path)
    head, embedding = output_head(model), model.get_input_embeddings()
    if (
        head is not None and head.weight is embedding.weight
    ):  # PEFT and Veneer train tied ones apart, so both are listed
        names = {id(m): n for n, m in model.named_modules()}
        pair = [names[id(embedding)], names[id(head)]]
        modules += [n for n in pair if set(pair) & set(modules) and n not in modules]
    inside = tuple(f"{path}." for path in modules)
    rest = {PREFIX + name: value.detach() for name, value in after.items() if name.startswith(inside)} if inside else {}
    if bias == "all":
        for name, value in after.items():
            path, _, leaf = name.rpartition(".")
            if "bias" in leaf and not (inside and name.startswith(inside)):
                rest[PREFIX + (f"{path}.base_layer.{leaf}" if path in layers else name)] = value.detach()
    return modules, rest, bias


def _fields(model: Any, base: str, targets: list[str], modules: list[str], bias: str) -> dict[str, Any]:
    """adapter_config.json; `write_adapter` adds the ranks."""
    return {
        "peft_type": "LORA",
        "task_type": task_type(model, modules),
        "base_model_name_or_path": base,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": bias,
        "target_modules": short_form(model, targets),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": modules or None,
        "init_lora_weights": True,
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(path)) for path in targets),
        "lora_bias": False,
    }

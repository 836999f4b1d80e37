"""Which modules an adapter changes: select, say what matched and what did not, and why."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from veneer.config import AdapterConfig
from veneer.errors import TargetError

ATTENTION_PARTS = re.compile(r"(^|_)(attn|attention|selfattention|encdecattention)($|_)")
MLP_PARTS = re.compile(r"(^|_)(mlp|ffn|ff|feed_forward|densereludense|experts?)($|_)")


@dataclass(frozen=True)
class Target:
    """One module to adapt, with the rank and alpha that hold for it."""

    name: str
    module: nn.Linear
    rank: int
    alpha: float


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether a rank_pattern/alpha_pattern key means this module: a regular expression over a name or its ending."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise TargetError(f"{pattern!r} is not a regular expression: {error}") from None


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's output head, where it says which module that is."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if getter else None
    except (NotImplementedError, AttributeError):
        return None


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear by name, adapted ones too (their frozen part), each module once, factors excluded."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name.removesuffix(".base_layer")] = module
    return found


def select(model: nn.Module, config: AdapterConfig) -> list[Target]:
    """The modules that `config` names, in the model's order.

    Raises `TargetError` where a name or pattern matches nothing (listing near misses), matches something that is no
    linear, or a rank exceeds a module's smaller dimension.
    """
    candidates = linears(model)
    if not candidates:
        raise TargetError("the model has no linear layer to adapt")
    chosen = _chosen(model, candidates, config.target_modules)
    chosen = _without(chosen, candidates, config.exclude_modules)
    chosen = _in_layers(chosen, config.layers)
    if not chosen:
        raise TargetError("target_modules, exclude_modules and layers together leave nothing to adapt")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(matches_pattern(key, name) for name in chosen):
                raise TargetError(f"{field} key {key!r} matches no adapted module; {near_misses(key, chosen)}")
    return [_target(name, candidates[name], config) for name in chosen]


def _target(name: str, module: nn.Linear, config: AdapterConfig) -> Target:
    rank = next((r for key, r in config.rank_pattern.items() if matches_pattern(key, name)), config.rank)
    alpha = next((a for key, a in config.alpha_pattern.items() if matches_pattern(key, name)), config.alpha)
    limit = min(module.in_features, module.out_features)
    if rank > limit:
        raise TargetError(
            f"rank {rank} is above what {name} ({module.out_features}×{module.in_features}) can hold: "
            f"use at most {limit}, or give it its own in rank_pattern"
        )
    return Target(name, module, rank, alpha)


def _chosen(model: nn.Module, candidates: dict[str, nn.Linear], wanted: str | list[str]) -> list[str]:
    head = output_head(model)
    body = [name for name, module in candidates.items() if module is not head]
    if wanted == "all-linear":
        return body
    if wanted in ("attention", "mlp"):
        own, other = (ATTENTION_PARTS, MLP_PARTS) if wanted == "attention" else (MLP_PARTS, ATTENTION_PARTS)
        chosen = [name for name in body if _innermost_is(name, own, other)]
        if not chosen:
            raise TargetError(f"no linear stands in a module that looks like {wanted}; {near_misses('', candidates)}")
        return chosen
    modules = dict(model.named_modules())
    if isinstance(wanted, str):
        chosen = [name for name in candidates if _fullmatch(wanted, name)]
        if not chosen:
            hint = f'; for a name or ending write a list: ["{wanted}"]' if _endings([wanted], candidates) else ""
            raise TargetError(
                f"target_modules {wanted!r} matches no whole module name{hint}; {near_misses(wanted, candidates)}"
            )
        return chosen
    for entry in wanted:
        if _endings([entry], candidates):
            continue
        other = next((type(m).__name__ for n, m in modules.items() if _is_ending(entry, n)), None)
        if other:
            raise TargetError(f"target_modules {entry!r} is a {other}, which cannot be adapted; choose linear layers")
        raise TargetError(f"target_modules {entry!r} matches nothing; {near_misses(entry, candidates)}")
    return _endings(wanted, candidates)


def _innermost_is(name: str, own: re.Pattern, other: re.Pattern) -> bool:
    for part in reversed(name.lower().split(".")[:-1]):
        if own.search(part):
            return True
        if other.search(part):
            return False
    return False


def _without(chosen: list[str], candidates: Iterable[str], exclude: str | list[str] | None) -> list[str]:
    if exclude is None:
        return chosen
    entries = [exclude] if isinstance(exclude, str) else exclude
    for entry in entries:
        hit = _fullmatch if isinstance(exclude, str) else _is_ending
        if not any(hit(entry, name) for name in chosen):
            raise TargetError(f"exclude_modules {entry!r} excludes nothing; {near_misses(entry, candidates)}")
        chosen = [name for name in chosen if not hit(entry, name)]
    return chosen


def layer_index(name: str) -> int | None:
    """The block index in a module name: its first all-digit part."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _in_layers(chosen: list[str], layers: list[int] | None) -> list[str]:
    if layers is None:
        return chosen
    present = {layer_index(name) for name in chosen} - {None}
    missing = sorted(set(layers) - present)
    if missing:
        span = f"{min(present)} to {max(present)}" if present else "none"
        raise TargetError(f"layers {missing} hold none of the target modules; block indices here: {span}")
    return [name for name in chosen if layer_index(name) in layers]


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise TargetError(f"{pattern!r} is not a regular expression: {error}") from None


def _is_ending(entry: str, name: str) -> bool:
    return name == entry or name.endswith("." + entry)


def _endings(entries: list[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if any(_is_ending(entry, name) for entry in entries)]


def near_misses(entry: str, names: Iterable[str]) -> str:
    """What the user may have meant: the closest last parts of module names, or all of them if none is close."""
    endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    near = difflib.get_close_matches(entry.rsplit(".", 1)[-1], endings, n=4, cutoff=0.4) if entry else []
    if near:
        return "near misses: " + ", ".join(near)
    return "linear layers here: " + ", ".join(endings[:12]) + (", …" if len(endings) > 12 else "")


def short_form(model: nn.Module, chosen: Iterable[str]) -> list[str]:
    """The shortest list of names that selects exactly `chosen` by name ending; whole names if no endings do."""
    chosen, names = set(chosen), list(linears(model))
    endings = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    return endings if set(_endings(endings, names)) == chosen else sorted(chosen)

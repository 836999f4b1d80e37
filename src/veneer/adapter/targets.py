"""Which modules an adapter changes: select, say what matched and what did not, and why."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from veneer.adapter.frozen import shape_of
from veneer.adapter.layers import KINDS, AdaptedModule, ParameterFactors, Routing, plain
from veneer.adapter.layers.embedding import adaptable
from veneer.adapter.task import task_heads
from veneer.config import AdapterConfig
from veneer.errors import TargetError

ATTENTION_PARTS = re.compile(r"(^|_)(attn|attention|selfattention|encdecattention)($|_)")
ADAPTERS_OWN = re.compile(r"\.lora_[^.]+$")
MLP_PARTS = re.compile(r"(^|_)(mlp|ffn|ff|feed_forward|densereludense|experts?)($|_)")


@dataclass(frozen=True)
class Target:
    """One module (or parameter of one) to adapt, with the rank and alpha that hold for it.

    `kind` is "linear", "conv", "embedding", "attention" (torch's MultiheadAttention) or "parameter"; for the last,
    `name` ends with the name of the parameter, which `module` holds.
    """

    name: str
    module: nn.Module
    rank: int
    alpha: float
    kind: str = "linear"

    @property
    def parameter(self) -> str:
        """The name of a target parameter in its module."""
        return self.name.rpartition(".")[2]

    def layer(self) -> AdaptedModule:
        """The module wrapped as its kind, with nothing on it and in no model yet: for its shapes."""
        if self.kind == "parameter":
            return ParameterFactors(self.module, Routing(), self.parameter)
        return KINDS[self.kind](self.module, Routing())

    @property
    def d_in(self) -> int:
        """Columns of W as the factors see it."""
        return self.layer().d_in

    @property
    def d_out(self) -> int:
        """Rows of W as the factors see it."""
        return self.layer().d_out


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


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The model's input embedding, where it has one and says which module that is."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        return getter() if getter else None
    except (NotImplementedError, AttributeError):  # a model of two towers, such as CLIP
        return None


def kind_of(module: nn.Module) -> str | None:
    """How a module is adapted; None if it cannot be."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if shape_of(module) is not None:
        return "linear"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else None


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that can be adapted, by name, adapted ones too (their frozen part), each once.

    The output projection of a MultiheadAttention is none: it is adapted with the whole module.
    """
    found, owned = {}, set()
    for name, module in model.named_modules():
        if kind_of(module) and id(module) not in owned:
            found[plain_name(name)] = module
        if isinstance(module, nn.MultiheadAttention):
            owned |= {id(part) for part in module.modules()} - {id(module)}
    return found


def plain_name(name: str) -> str:
    """A module's or parameter's name without the `base_layer` that adapting puts in."""
    return name.replace(".base_layer", "")


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters by plain name, a shared one at each place; no walk over the adapters' own."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not ADAPTERS_OWN.search(path):
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    found[plain_name(f"{path}.{leaf}" if path else leaf)] = parameter
    return found


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The candidates that hold linears."""
    return {name: m for name, m in candidates(model).items() if kind_of(m) in ("linear", "attention")}


def select(model: nn.Module, config: AdapterConfig) -> list[Target]:
    """The modules and parameters that `config` names, in the model's order.

    Raises `TargetError` where a name or pattern matches nothing (listing near misses), matches something that cannot be
    adapted, or a rank exceeds a module's smaller dimension.
    """
    found = candidates(model)
    chosen = []
    if config.target_modules:
        if not found:
            raise TargetError("the model has no linear layer to adapt")
        chosen = named(model, found, config.target_modules)
        chosen = _without(chosen, found, config.exclude_modules)
        chosen = _in_layers(chosen, config.layers)
        if not chosen:
            raise TargetError("target_modules, exclude_modules and layers together leave nothing to adapt")
    targets = [(name, found[name], kind_of(found[name])) for name in chosen]
    targets += target_parameters(model, config)
    names = [name for name, _, _ in targets]
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(matches_pattern(key, name) for name in names):
                raise TargetError(f"{field} key {key!r} matches no adapted module; {near_misses(key, names)}")
    return [part for name, module, kind in targets for part in _targets(name, module, kind, config)]


def target_parameters(model: nn.Module, config: AdapterConfig) -> list[tuple[str, nn.Module, str]]:
    """What target_parameters names: (name, module that holds it, "parameter")."""
    if not config.target_parameters:
        return []
    own = {plain_name(name): name for name, _ in model.named_parameters() if ".lora_" not in name}
    found: dict[str, tuple[str, nn.Module, str]] = {}
    for entry in config.target_parameters:
        hits = _in_layers([name for name in own if _is_ending(entry, name)], config.layers)
        if not hits:
            raise TargetError(f"target_parameters {entry!r} matches nothing; {near_misses(entry, own, 'parameters')}")
        for name in hits:
            path, _, leaf = own[name].rpartition(".")
            module = model.get_submodule(path)
            if getattr(module, leaf).ndim not in (2, 3):
                raise TargetError(f"target_parameters {entry!r}: {name} has {getattr(module, leaf).ndim} dimensions")
            if kind_of(module) == "linear":
                raise TargetError(f"{name} is the weight of a linear: name {plain_name(path)} in target_modules")
            found[name] = (name, module, "parameter")
    return [found[name] for name in own if name in found]


def rank_and_alpha(name: str, config: AdapterConfig) -> tuple[int, float]:
    """The rank and alpha that hold for a module, after rank_pattern and alpha_pattern."""
    rank = next((r for key, r in config.rank_pattern.items() if matches_pattern(key, name)), config.rank)
    return rank, next((a for key, a in config.alpha_pattern.items() if matches_pattern(key, name)), config.alpha)


def with_parts(name: str, module: nn.Module, kind: str) -> list[tuple[str, nn.Module, str]]:
    """A target and what is adapted with it: the output projection of a MultiheadAttention."""
    if kind != "attention":
        return [(name, module, kind)]
    out = module.out_proj.base_layer if isinstance(module.out_proj, AdaptedModule) else module.out_proj
    return [(name, module, kind), (f"{name}.out_proj", out, "linear")]


def _targets(name: str, module: nn.Module, kind: str, config: AdapterConfig) -> list[Target]:
    rank, alpha = rank_and_alpha(name, config)
    targets = [Target(part, inner, rank, alpha, k) for part, inner, k in with_parts(name, module, kind)]
    for target in targets:
        check_module(target, config)
        limit = min(target.d_in, target.d_out)
        if rank > limit:
            raise TargetError(
                f"rank {rank} is above what {target.name} ({target.d_out}×{target.d_in}) can hold: "
                f"use at most {limit}, or give it its own in rank_pattern"
            )
    return targets


def check_module(target: Target, config: AdapterConfig) -> None:
    """Raise `TargetError` for a module that is of a fitting kind and still cannot be adapted so."""
    module, reason = target.module, None
    if target.kind == "embedding":
        reason = adaptable(module)
    elif target.kind == "attention" and not module._qkv_same_embed_dim:
        reason = "its query, key and value sizes differ"
    elif target.kind == "attention" and config.dropout:
        reason = "torch computes its projections itself, so there is no input to drop from: use dropout: 0"
    elif target.kind == "conv" and target.rank % module.groups:
        reason = f"rank {target.rank} is no multiple of its {module.groups} groups"
    if reason is None and config.lora_fa and target.kind == "embedding":
        reason = "lora_fa freezes A, and an embedding's A starts at 0, so nothing would be learnt"
    if reason is None and config.invocation and target.kind != "linear":
        reason = f"invocation (aLoRA) is defined for linears only, not for {type(module).__name__}"
    if reason is None:
        layer = target.layer()
        wrong = [o for o in ("dora", "lora_bias") if getattr(config, o) and not layer.supports(o)]
        reason = f"{wrong[0]} is not defined for {type(module).__name__}" if wrong else None
    if reason:
        raise TargetError(f"{target.name} cannot be adapted: {reason}")


def embedding_twins(model: nn.Module, embedding: nn.Embedding) -> list[nn.Embedding]:
    """The other embeddings that share the weight of this one."""
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embedding]
    return [m for m in others if m.weight is embedding.weight]


def check_twins(model: nn.Module, targets: list[Target]) -> None:
    """Raise `TargetError` for an adapted embedding that only lends its weight to others: nothing would see the adapter."""
    chosen, shared = {id(target.module) for target in targets}, input_embedding(model)
    shared = shared if shared is None else plain(shared)
    for target in targets:
        if target.kind == "embedding" and target.module is shared:
            twins = {id(twin) for twin in embedding_twins(model, target.module)}
            if twins and not twins & chosen:
                names = ", ".join(plain_name(name) for name, m in model.named_modules() if id(m) in twins)
                raise TargetError(f"{target.name} lends its weight to {names}, which look up in its place: name those")


def named(model: nn.Module, candidates: dict[str, nn.Module], wanted: str | list[str]) -> list[str]:
    """The candidates that target_modules means, before exclude_modules and layers. Raises `TargetError`."""
    heads = [head for head in (output_head(model), *task_heads(model).values()) if head is not None]
    spared = {id(part) for head in heads for part in head.modules()}
    linear = [name for name, module in candidates.items() if kind_of(module) in ("linear", "attention")]
    body = [name for name in linear if id(candidates[name]) not in spared]
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
            raise TargetError(
                f"target_modules {entry!r} is a {other}, which cannot be adapted; "
                f"choose linears, convolutions, embeddings or MultiheadAttention modules"
            )
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


def near_misses(entry: str, names: Iterable[str], what: str = "modules") -> str:
    """What the user may have meant: the closest last parts of module names, or all of them if none is close."""
    endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    near = difflib.get_close_matches(entry.rsplit(".", 1)[-1], endings, n=4, cutoff=0.4) if entry else []
    if near:
        return "near misses: " + ", ".join(near)
    return f"{what} here: " + ", ".join(endings[:12]) + (", …" if len(endings) > 12 else "")


def short_form(model: nn.Module, chosen: Iterable[str]) -> list[str]:
    """The shortest list of names that selects exactly `chosen` by name ending; whole names if no endings do."""
    chosen, names = set(chosen), list(candidates(model))
    endings = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    return endings if set(_endings(endings, names)) == chosen else sorted(chosen)

"""What an adapter leaves as it is in a model, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from veneer.adapter.scope import Plan
from veneer.adapter.targets import candidates, input_embedding, kind_of, layer_index, named, output_head, plain_name
from veneer.adapter.task import task_heads

KIND_WORDS = {"linear": "linear", "attention": "attention", "conv": "convolution", "embedding": "embedding"}


@dataclass(frozen=True)
class LeftOut:
    """Modules (or parameters) of one name ending and type that no factors are put on, for one reason."""

    name: str
    type: str
    modules: int
    parameters: int
    reason: str


def left_out(plan: Plan) -> list[LeftOut]:
    """Everything with weights that the plan puts no factors on, grouped; to be called before the plan is installed."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, kind, numel, reason in _each(plan):
        ending = name.rpartition(".")[2]
        if ending.isdigit():  # a place in a list says nothing: name the list too
            ending = ".".join(name.split(".")[-2:])
        groups.setdefault((ending, kind, reason), []).append(numel)
    return [LeftOut(n, kind, len(sizes), sum(sizes), why) for (n, kind, why), sizes in groups.items()]


def _each(plan: Plan) -> Iterator[tuple[str, str, int, str]]:
    """(name, type, numbers, reason) of each module that is left out, or of its single parameters if it is no layer."""
    model, reasons = plan.model, _Reasons(plan)
    adapted = {t.name for t in plan.targets}
    whole = {id(t.module) for t in plan.targets if t.kind != "parameter"}
    inside = {id(part) for t in plan.targets if t.kind == "attention" for part in t.module.modules()}
    for path, module in model.named_modules():
        name, own = plain_name(path), {n: p for n, p in module._parameters.items() if p is not None}
        if not own or id(module) in whole | inside:
            continue
        if kind_of(module) or all(p.ndim < 2 for p in own.values()) or reasons.kept(name):
            yield name, type(module).__name__, sum(p.numel() for p in own.values()), reasons.of_module(name, module)
            continue
        for leaf, parameter in own.items():
            full = f"{name}.{leaf}" if name else leaf
            if full not in adapted:
                yield full, type(module).__name__, parameter.numel(), reasons.of_parameter(full, parameter)


class _Reasons:
    """Why a module or parameter is left out."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config, model = plan, plan.config, plan.model
        self.head, self.heads = output_head(model), task_heads(model)
        self.found = candidates(model)
        self.named = set(named(model, self.found, self.config.target_modules) if self.config.target_modules else ())
        self.embedding = input_embedding(model)

    def kept(self, name: str) -> str | None:
        """The module of modules_to_save that this one is, or is part of."""
        return next((kept for kept in self.plan.modules if name == kept or name.startswith(f"{kept}.")), None)

    def of_module(self, name: str, module: nn.Module) -> str:
        wanted, kind = self.config.target_modules, kind_of(module)
        if (kept := self.kept(name)) is not None:
            return "the task's new head: trained in full" if kept in self.heads else "modules_to_save: trained in full"
        if name in self.plan.tokens:
            return f"{len(self.plan.tokens[name][1])} of its rows are trained (trainable_tokens)"
        if kind is None:
            return "vectors, such as a norm's: there is no matrix to factor"
        if name in self.named:
            if self.config.layers is not None and layer_index(name) not in self.config.layers:
                return "not in `layers`"
            return "exclude_modules"
        if module is self.head:
            tied = getattr(self.embedding, "weight", None) is module.weight
            return "the output head" + (", tied to the input embedding" if tied else "")
        if not isinstance(wanted, str) or wanted not in ("all-linear", "attention", "mlp"):
            return "target_modules does not name it"
        if kind not in ("linear", "attention"):
            return f"{KIND_WORDS[kind]}: {wanted} takes linears; name it in target_modules"
        if name.split(".")[0] in self.heads:
            return "the task's head"
        if name not in self.found:
            return "part of a MultiheadAttention: adapted with it or not at all"
        return f"not in {'an attention' if wanted == 'attention' else 'an MLP'} module"

    def of_parameter(self, name: str, parameter: nn.Parameter) -> str:
        if self.config.layers is not None and layer_index(name) not in self.config.layers:
            return "not in `layers`"
        if parameter.ndim < 2:
            return "vectors, such as a norm's: there is no matrix to factor"
        if parameter.ndim > 3:
            return f"a parameter of {parameter.ndim} dimensions: cannot be adapted"
        what = "experts in one tensor" if parameter.ndim == 3 else "a matrix that is no layer"
        return f"{what}: name it in target_parameters"

"""attach, detach: the only code that changes a model."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn

from veneer.adapter.bank import Bank, Entry
from veneer.adapter.init import INITIALISATIONS
from veneer.adapter.layers import AdaptedLinear
from veneer.adapter.targets import Target, near_misses, select
from veneer.config import AdapterConfig
from veneer.errors import AdapterStateError, TargetError

BANK = "veneer_bank"


def get_bank(model: nn.Module) -> Bank:
    """The bank of an adapted model; `AdapterStateError` if the model is not adapted."""
    bank = model.__dict__.get(BANK)
    if bank is None:
        raise AdapterStateError("no adapter is attached to this model: call veneer.attach(model, config) first")
    return bank


def attach(
    model: nn.Module, config: AdapterConfig | None = None, *, name: str = "default", seed: int | None = None
) -> Bank:
    """Put a new adapter on `model`, in place, freeze everything else, activate it and return the model's bank.

    Works on any module tree with linears. A second call adds a further adapter under another name. `seed` makes the
    factors reproducible (absent: torch's global generator). The layers are found and checked before anything changes.
    Raises `TargetError` (a target matches nothing, cannot be adapted or is too small for the rank) and
    `AdapterStateError` (name taken, or the model carries another library's adapter).
    """
    config = config or AdapterConfig()
    check_free(model, name)
    targets = select(model, config)
    return install(model, config, targets, _factors(targets, config, seed), name)


def install(
    model: nn.Module, config: AdapterConfig, targets: list[Target], factors: list[tuple[Tensor, Tensor]], name: str
) -> Bank:
    """`attach` with the targets already chosen and their factors (lora_A, lora_B) given."""
    check_free(model, name)
    kept = _modules_to_save(model, config, targets)
    biases = _biases(model, config, [target.name for target in targets])
    bank = model.__dict__.get(BANK) or _new_bank(model)
    for target, (lora_A, lora_B) in zip(targets, factors, strict=True):
        layer = bank.layers.get(target.name) or _wrap(model, bank, target)
        dtype = target.module.weight.dtype if config.dtype == "base" else torch.float32
        place = {"device": target.module.weight.device, "dtype": dtype, "copy": True}
        lora_A, lora_B = (t.to(**place) for t in (lora_A, lora_B))
        layer.add(name, lora_A, lora_B, alpha=target.alpha, rslora=config.rslora, dropout=config.dropout)
    modules = {path: copy.deepcopy(module).requires_grad_(True) for path, module in kept.items()}
    bank.entries[name] = Entry(config, [target.name for target in targets], modules, biases)
    bank.activate(name)
    return bank


def detach(model: nn.Module) -> nn.Module:
    """Take every adapter off: the base's own modules return, untouched, with the requires_grad they had."""
    bank = get_bank(model)
    bank.activate(None)
    base = {id(layer): layer.base_layer for layer in bank.layers.values()}
    for parent, leaf, child in _spots(model):
        if id(child) in base:
            setattr(parent, leaf, base[id(child)])
    for path, trained in bank.frozen.items():
        model.get_parameter(path).requires_grad_(trained)
    del model.__dict__[BANK]
    return model


def check_free(model: nn.Module, name: str) -> None:
    """Raise `AdapterStateError` unless the model can take a further adapter of this name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AdapterStateError(f"adapter name {name!r}: use letters, digits, '_' and '-'")
    bank = model.__dict__.get(BANK)
    if bank is not None and name in bank.entries:
        raise AdapterStateError(f"the model already has an adapter {name!r}: choose another name, or detach first")
    for path, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            raise AdapterStateError(
                f"{path or 'the model'} is a PEFT {type(module).__name__}: unload PEFT's adapter first"
            )
        if isinstance(module, AdaptedLinear) and bank is None:
            raise AdapterStateError(f"{path} is already adapted, as part of another model: attach to that one")


def _new_bank(model: nn.Module) -> Bank:
    bank = Bank(model)
    bank.frozen = {path: p.requires_grad for path, p in model.named_parameters()}
    model.requires_grad_(False)
    model.__dict__[BANK] = bank  # not a submodule: it must not show in state_dict() or named_modules()
    return bank


def _factors(targets: list[Target], config: AdapterConfig, seed: int | None) -> list[tuple]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    initialise = INITIALISATIONS[config.init]
    return [initialise(t.rank, t.module.in_features, t.module.out_features, generator) for t in targets]


def _spots(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every place in the tree that holds a module; a shared module stands at several."""
    return [(parent, leaf, child) for parent in model.modules() for leaf, child in list(parent._modules.items())]


def _wrap(model: nn.Module, bank: Bank, target: Target) -> AdaptedLinear:
    layer = AdaptedLinear.from_base(target.module, bank.routing)
    layer.train(target.module.training)
    for parent, leaf, child in _spots(model):
        if child is target.module and parent is not layer:
            setattr(parent, leaf, layer)
    bank.layers[target.name] = layer
    return layer


def _modules_to_save(model: nn.Module, config: AdapterConfig, targets: list[Target]) -> dict[str, nn.Module]:
    modules = {path.removesuffix(".base_layer"): m for path, m in model.named_modules() if path}
    kept = {}
    for entry in config.modules_to_save:
        found = {p: m for p, m in modules.items() if p == entry or p.endswith("." + entry)}
        if not found:
            raise TargetError(f"modules_to_save {entry!r} matches nothing; {near_misses(entry, modules)}")
        kept |= found
    for path, module in kept.items():
        inside = next((t.name for t in targets if t.name == path or t.name.startswith(path + ".")), None)
        if inside:
            raise TargetError(f"{inside} is in modules_to_save and in target_modules: exclude it from one")
        weights = {id(p) for p in module.parameters()}
        for other, rest in modules.items():
            related = other == path or other.startswith(path + ".") or path.startswith(other + ".")
            if not related and other not in kept and any(id(p) in weights for p in rest.parameters(recurse=False)):
                if module is getattr(model, "get_output_embeddings", lambda: None)():
                    continue  # an own copy of a tied head is well defined: the embedding stays the base's
                raise TargetError(
                    f"{path} shares its weight with {other} (tied): training it alone would leave {other} behind; "
                    f"list both in modules_to_save (they are then trained apart) or neither"
                )
    return kept


def _biases(model: nn.Module, config: AdapterConfig, targets: list[str]) -> dict[str, nn.Parameter]:
    if config.bias == "none":
        return {}
    chosen = {}
    for path, parameter in model.named_parameters():
        path = path.replace(".base_layer", "")
        parent, _, leaf = path.rpartition(".")
        if leaf == "bias" and (config.bias == "all" or parent in targets):
            chosen[path] = nn.Parameter(parameter.detach().clone())
    if not chosen:
        where = "the model has" if config.bias == "all" else "the adapted modules have"
        raise TargetError(f"bias: {config.bias} has nothing to train, as {where} no bias; use bias: none")
    return chosen

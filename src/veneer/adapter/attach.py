"""attach, detach, merge: the only code that changes a model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.bank import Bank, Entry
from veneer.adapter.init import Start, blank, start
from veneer.adapter.invocation import watch_invocation
from veneer.adapter.layers import (
    KINDS,
    AdaptedModule,
    AdaptedParameters,
    Options,
    TiedHead,
    TrainedTokens,
    TrainedTokensHead,
    TrainedTokensTwin,
    container_for,
    plain,
)
from veneer.adapter.layers.embedding import adaptable
from veneer.adapter.targets import Target, check_twins, embedding_twins, near_misses, output_head, plain_name, select
from veneer.adapter.task import task_heads
from veneer.adapter.vocabulary import add_tokens, rows_to_train
from veneer.config import AdapterConfig
from veneer.errors import AdapterStateError, ConfigError, TargetError

BANK = "veneer_bank"


def get_bank(model: nn.Module) -> Bank:
    """The bank of an adapted model; `AdapterStateError` if the model is not adapted."""
    bank = model.__dict__.get(BANK)
    if bank is None:
        raise AdapterStateError("no adapter is attached to this model: call veneer.attach(model, config) first")
    return bank


def attach(
    model: nn.Module,
    config: AdapterConfig | None = None,
    *,
    name: str = "default",
    seed: int | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    float_weights: Callable[[str], Tensor] | None = None,
    tokenizer: Any = None,
) -> Bank:
    """Put a new adapter on `model`, in place, freeze everything else, activate it and return the model's bank.

    Works on any module tree. A second call adds a further adapter under another name. `seed` makes the factors
    reproducible (absent: torch's global generator). `calibration` holds keyword arguments of a few model calls, for the
    initialisations that look at data, and `float_weights` gives a module's weight from before quantisation, for
    "loftq"; other adapters do not act meanwhile. `tokenizer` is for config.new_tokens and a textual config.invocation.
    The layers are found and checked before anything changes. Raises `TargetError` (a target matches nothing, cannot be
    adapted or is too small for the rank), `ConfigError` (an initialisation that does not fit) and `AdapterStateError`
    (name taken, or the model carries another library's adapter).
    """
    plan, bank = _plan(model, config or AdapterConfig(), name, tokenizer), model.__dict__.get(BANK)
    with bank.disabled() if bank else nullcontext():
        starts = start(
            model, plan.targets, plan.config, seed=seed, calibration=calibration, float_weights=float_weights
        )
    return _install_kept(plan, starts, name)


def attach_blank(
    model: nn.Module, config: AdapterConfig, rows: Mapping[str, int], *, name: str = "default", tokenizer: Any = None
) -> Bank:
    """`attach` with factors of zeros for a checkpoint to fill; `rows` says by target how many rows its lora_A has."""
    plan = _plan(model, config, name, tokenizer)
    return _install_kept(plan, blank(plan.targets, plan.config, rows), name)


def _plan(model: nn.Module, config: AdapterConfig, name: str, tokenizer: Any) -> Plan:
    check_free(model, name)
    config = with_token_ids(model, config, tokenizer)
    targets = select(model, config)
    check_twins(model, targets)
    return Plan(model, with_task_heads(model, config, targets), targets)


def _install_kept(plan: Plan, starts: list[Start], name: str) -> Bank:
    """`install` without the targets that an initialisation left no rank."""
    kept = [(target, begin) for target, begin in zip(plan.targets, starts, strict=True) if begin.rank != 0]
    if len(kept) < len(starts):
        plan = Plan(plan.model, plan.config, [target for target, _ in kept])
    return install(plan, [begin for _, begin in kept], name)


def with_token_ids(model: nn.Module, config: AdapterConfig, tokenizer: Any) -> AdapterConfig:
    """The configuration with its texts as token ids: new_tokens (which the tokenizer and the model are given, and whose
    rows are trained) and invocation. Raises `ConfigError` without a tokenizer for them."""
    texts = [*config.new_tokens, *([config.invocation] if isinstance(config.invocation, str) else [])]
    if not texts:
        return config
    if tokenizer is None:
        raise ConfigError(f"{texts[0]!r} is a text (new_tokens or invocation): pass tokenizer=…")
    changes = {}
    if config.new_tokens:
        ids = add_tokens(model, tokenizer, config.new_tokens)
        changes["trainable_tokens"] = rows_to_train(model, ids, config.trainable_tokens)
    if isinstance(config.invocation, str):
        changes["invocation"] = tokenizer.encode(config.invocation, add_special_tokens=False)
    return config.model_copy(update=changes)


def with_task_heads(model: nn.Module, config: AdapterConfig, targets: list[Target]) -> AdapterConfig:
    """The configuration with a classifier's new head among modules_to_save, unless it is adapted or named there."""
    heads = [
        head
        for head in task_heads(model)
        if head not in config.modules_to_save
        and not any(t.name == head or t.name.startswith(f"{head}.") for t in targets)
    ]
    return config.model_copy(update={"modules_to_save": [*config.modules_to_save, *heads]}) if heads else config


class Plan:
    """What an adapter will change in a model, found and checked before anything changes.

    Raises `TargetError` as `attach` does; a `saved` adapter may ask for biases where there are none, as PEFT's do.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, targets: list[Target], *, saved: bool = False) -> None:
        self.model, self.config, self.targets = model, config, targets
        self.tied = self._tied_embedding()
        self.tokens = trained_tokens(model, config, targets)
        self.modules = _modules_to_save(model, config, targets)
        self.biases = _biases(model, config, [target.name for target in targets], set(self.modules))
        if config.bias != "none" and not (self.biases or saved):
            where = "the model has" if config.bias == "all" else "the adapted modules have"
            raise TargetError(f"bias: {config.bias} has nothing to train, as {where} no bias; use bias: none")

    def _tied_embedding(self) -> str | None:
        """The adapted embedding whose weight the output head shares, if the head is to see the adapter."""
        head = output_head(self.model)
        for target in self.targets:
            if target.kind == "embedding" and head is not None and plain(head).weight is target.module.weight:
                if self.config.tied_head == "refuse":
                    raise TargetError(
                        f"{target.name} shares its weight with the output head (tied): choose tied_head: both (the head "
                        f"sees the adapter too) or tied_head: embedding (it does not, as in PEFT)"
                    )
                if self.config.tied_head == "both":
                    if self.config.dora:
                        raise TargetError("tied_head: both is not defined with dora: use tied_head: embedding")
                    return target.name
        return None


def install(plan: Plan, starts: list[Start], name: str) -> Bank:
    """`attach` with the plan made and the factors given."""
    model, config = plan.model, plan.config
    check_free(model, name)
    bank = model.__dict__.get(BANK) or _new_bank(model)
    if bank.merged is not None:
        raise AdapterStateError("adapters are merged into the base: unmerge() first")
    for target, begin in zip(plan.targets, starts, strict=True):
        layer = bank.layers.get(target.name) or _wrap(bank, target)
        frozen = layer.weight
        dtype = frozen.dtype if config.dtype == "base" and frozen.is_floating_point() else torch.float32
        place = {"device": frozen.device, "dtype": dtype, "copy": True}
        options = Options(config.rslora, config.dropout, config.dora, config.lora_bias, begin.changes_base)
        shapes = layer.factor_shapes(target.rank if begin.rank is None else begin.rank)
        lora_A, lora_B = (f.to(**place).reshape(shape) for f, shape in zip((begin.lora_A, begin.lora_B), shapes))
        layer.add(name, lora_A, lora_B, alpha=target.alpha if begin.alpha is None else begin.alpha, options=options)
    if plan.tied:
        _tie_head(bank, plan.tied, name)
    for path, (module, indices) in plan.tokens.items():
        _train_tokens(bank, path, module).add_rows(name, indices, torch.float32)
    modules = {path: copy.deepcopy(module).requires_grad_(True) for path, module in plan.modules.items()}
    targets = [target.name for target in plan.targets]
    bank.entries[name] = Entry(config, targets, list(plan.tokens), modules, plan.biases)
    if config.invocation:
        bank.entries[name].undo.append(watch_invocation(bank, name, config.invocation))
    bank.activate(name)
    return bank


def detach(model: nn.Module) -> nn.Module:
    """Take every adapter off: the base's own modules return, untouched, with the requires_grad they had."""
    bank = get_bank(model)
    if bank.merged is not None:
        bank.unmerge()
    bank.activate(None)
    _unwrap(bank)
    for path, trained in bank.frozen.items():
        model.get_parameter(path).requires_grad_(trained)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Merge the active adapters into the weights for good and take the bank off; the model is the base's kind again.

    Raises `AdapterStateError` where `Bank.merge` does. A head whose weight was shared with an embedding and is not any
    more (only one of the two was adapted) is untied in the model's config too.
    """
    bank = get_bank(model)
    bank.merge()
    bank.routing.stack, bank._originals = {}, {}  # whole modules and biases that are swapped in stay
    _unwrap(bank)
    head, embedding = output_head(model), getattr(model, "get_input_embeddings", lambda: None)()
    config = getattr(model, "config", None)
    if head is not None and embedding is not None and getattr(config, "tie_word_embeddings", False):
        if head.weight is not embedding.weight:
            if torch.equal(head.weight, embedding.weight):
                head.weight = embedding.weight
            else:
                for part in (config, config.get_text_config()):
                    part.tie_word_embeddings = False
    return model


def _unwrap(bank: Bank) -> None:
    mine = {id(layer) for layer in bank.wrappers}
    for parent, leaf, child in _spots(bank.model):
        if id(child) in mine and not isinstance(parent, AdaptedModule):
            setattr(parent, leaf, plain(child))
    for undo in (*bank.undo, *(u for entry in bank.entries.values() for u in entry.undo)):
        undo()
    del bank.model.__dict__[BANK]


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
        if isinstance(module, AdaptedModule) and bank is None:
            raise AdapterStateError(f"{path} is already adapted, as part of another model: attach to that one")


def _new_bank(model: nn.Module) -> Bank:
    bank = Bank(model)
    bank.frozen = {path: p.requires_grad for path, p in model.named_parameters()}
    model.requires_grad_(False)
    model.__dict__[BANK] = bank  # not a submodule: it must not show in state_dict() or named_modules()
    return bank


def _spots(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every place in the tree that holds a module; a shared module stands at several."""
    return [(parent, leaf, child) for parent in model.modules() for leaf, child in list(parent._modules.items())]


def _wrap(bank: Bank, target: Target) -> AdaptedModule:
    if target.kind != "parameter":
        layer = _replace(bank, target.module, KINDS[target.kind].from_base(target.module, bank.routing))
    else:
        here = [w for w in bank.wrappers if isinstance(w, AdaptedParameters) and w.base_layer is target.module]
        make = container_for(target.module)
        container = here[0] if here else _replace(bank, target.module, make(target.module, bank.routing))
        layer = container.part(target.parameter)
    bank.layers[target.name] = layer
    return layer


def _replace(bank: Bank, module: nn.Module, layer: AdaptedModule) -> AdaptedModule:
    """Put a layer everywhere that a module of the base stands."""
    layer.train(module.training)
    for parent, leaf, child in _spots(bank.model):
        if child is module and parent is not layer:
            setattr(parent, leaf, layer)
            if isinstance(parent, nn.TransformerEncoderLayer):
                _slow_path(bank, parent)
    bank.wrappers.append(layer)
    return layer


def _slow_path(bank: Bank, block: nn.TransformerEncoderLayer) -> None:
    """Keep torch's block from its inference shortcut, which reads the weights past our layers."""
    before = block.activation_relu_or_gelu
    block.activation_relu_or_gelu = 0
    bank.undo.append(partial(setattr, block, "activation_relu_or_gelu", before))  # unlike a lambda, copied with it


def _tie_head(bank: Bank, path: str, name: str) -> None:
    source, head = bank.layers[path], output_head(bank.model)
    if not isinstance(head, TiedHead):
        head = _replace(bank, head, TiedHead(head, source))
    head.names.add(name)


def _train_tokens(bank: Bank, path: str, module: nn.Module) -> TrainedTokens:
    if path in bank.tokens:
        return bank.tokens[path]
    head = output_head(bank.model)
    layer = bank.tokens[path] = _replace(bank, module, TrainedTokens(module, bank.routing))
    if head is not None and plain(head) is not module and plain(head).weight is module.weight:
        _replace(bank, head, TrainedTokensHead(head, layer))
    for twin in embedding_twins(bank.model, module):
        _replace(bank, twin, TrainedTokensTwin(twin, layer))
    return layer


def trained_tokens(
    model: nn.Module, config: AdapterConfig, targets: list[Target]
) -> dict[str, tuple[nn.Module, list[int]]]:
    """Name of an embedding or output head → (module, token ids) of config.trainable_tokens. Raises `TargetError`."""
    wanted = config.trainable_tokens
    if not wanted:
        return {}
    head = output_head(model)
    modules = {plain_name(path): plain(m) for path, m in model.named_modules() if ".lora_" not in path}
    modules = {path: m for path, m in modules.items() if isinstance(m, nn.Embedding) or head and m is plain(head)}
    if not isinstance(wanted, dict):
        embedding = plain(model.get_input_embeddings()) if hasattr(model, "get_input_embeddings") else None
        names = [path for path, m in modules.items() if m is embedding]
        if not names:
            raise TargetError("the model does not say which its input embedding is: name it, {module: [ids]}")
        wanted = {names[0]: wanted}
    found = {}
    for entry, indices in wanted.items():
        paths = [p for p in modules if p == entry or p.endswith("." + entry)]
        if not paths:
            raise TargetError(
                f"trainable_tokens {entry!r} is no embedding or output head; {near_misses(entry, modules)}"
            )
        for path in paths:
            module, rows = modules[path], modules[path].weight.shape[0]
            reason = adaptable(module) if isinstance(module, nn.Embedding) else None
            beyond = [i for i in indices if not 0 <= i < rows]
            if beyond:
                reason = f"token id {beyond[0]} is beyond its {rows} rows (new_tokens makes it larger)"
            if any(target.name == path for target in targets):
                reason = "it is in target_modules too: choose one of the two"
            if len(set(indices)) != len(indices):
                reason = "a token id is given twice"
            if reason:
                raise TargetError(f"trainable_tokens: {path}: {reason}")
            found[path] = (module, list(indices))
    return found


def _modules_to_save(model: nn.Module, config: AdapterConfig, targets: list[Target]) -> dict[str, nn.Module]:
    modules = {plain_name(path): plain(m) for path, m in model.named_modules() if path and ".lora_" not in path}
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


def _biases(model: nn.Module, config: AdapterConfig, targets: list[str], kept: set[str]) -> dict[str, nn.Parameter]:
    """Copies of the biases that config.bias names; those of modules that are `kept` whole come with the module."""
    chosen = {}
    if config.bias == "none":
        return chosen
    for path, parameter in model.named_parameters():
        path = plain_name(path)
        parent, _, leaf = path.rpartition(".")
        if any(f"{parent}.".startswith(f"{module}.") for module in kept):
            continue
        if leaf == "bias" and parent in targets or config.bias == "all" and "bias" in leaf and "lora_" not in path:
            chosen[path] = nn.Parameter(parameter.detach().clone())
    return chosen

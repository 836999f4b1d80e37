"""attach, detach, merge: the only code that changes a model."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.bank import NAME, Bank, Entry
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
from veneer.adapter.pretrained import claim
from veneer.adapter.replay import watch_calls
from veneer.adapter.scope import Plan, with_task_heads, with_token_ids
from veneer.adapter.targets import Target, check_twins, embedding_twins, input_embedding, output_head, select
from veneer.config import AdapterConfig
from veneer.errors import AdapterStateError, ConfigError

BANK = "veneer_bank"
Places = defaultdict[int, dict[tuple[int, str], nn.Module]]
"""By id of a module, the places that hold it: the parent, by its id and the name there. One walk of a large model's tree
for each of its layers would take seconds."""
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def get_bank(model: nn.Module) -> Bank:
    """The bank of an adapted model, wrapped or not; `AdapterStateError` if the model is not adapted."""
    bank = _inside(model).__dict__.get(BANK)
    if bank is None:
        raise AdapterStateError("no adapter is attached to this model: call veneer.attach(model, config) first")
    return bank


def _inside(model: nn.Module) -> nn.Module:
    """The model in torch.compile's wrapper or a data-parallel one; any other is itself."""
    while isinstance(model, nn.Module) and ("_orig_mod" in model._modules or isinstance(model, PARALLEL)):
        model = model._modules.get("_orig_mod", model._modules.get("module"))
    return model


def check_model(model: nn.Module) -> None:
    """Raise `AdapterStateError` for what an adapter cannot be put on: no module, or a wrapper around one.

    Names of layers would begin with the wrapper's, and DistributedDataParallel would not see the new parameters.
    """
    if not isinstance(model, nn.Module):
        raise AdapterStateError(f"an adapter goes on a torch.nn.Module, not on {type(model).__name__} {model!r}"[:200])
    if _inside(model) is not model:
        leaf = "_orig_mod" if "_orig_mod" in model._modules else "module"
        raise AdapterStateError(
            f"the model is wrapped ({type(model).__name__}): put the adapter on the model inside, .{leaf}, and wrap it then"
        )


def check_config(config: AdapterConfig) -> AdapterConfig:
    """The configuration; `ConfigError` for a mapping or another library's."""
    if not isinstance(config, AdapterConfig):
        hint = "; veneer.from_peft(config) makes one of it" if type(config).__module__.startswith("peft.") else ""
        raise ConfigError(f"config is a veneer.AdapterConfig, not a {type(config).__name__}{hint}")
    return config


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
    plan, bank = planned(model, config or AdapterConfig(), name, tokenizer), model.__dict__.get(BANK)
    with bank.disabled() if bank else nullcontext():
        starts = start(
            model, plan.targets, plan.config, seed=seed, calibration=calibration, float_weights=float_weights
        )
    return _install_kept(plan, starts, name)


def attach_blank(
    model: nn.Module, config: AdapterConfig, rows: Mapping[str, int], *, name: str = "default", tokenizer: Any = None
) -> Bank:
    """`attach` with factors of zeros for a checkpoint to fill; `rows` says by target how many rows its lora_A has."""
    plan = planned(model, config, name, tokenizer)
    return _install_kept(plan, blank(plan.targets, plan.config, rows), name)


def planned(model: nn.Module, config: AdapterConfig, name: str = "default", tokenizer: Any = None) -> Plan:
    """What `attach` will change, with every check that it makes before it looks at the initialisation."""
    check_model(model)
    check_config(config)
    if config.adalora is not None:
        raise ConfigError(
            "adalora is the training loop's: use veneer.train, or attach without it and drive "
            "veneer.training.adalora.AdaLora in a loop of your own"
        )
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


def install(plan: Plan, starts: list[Start], name: str) -> Bank:
    """`attach` with the plan made and the factors given."""
    model, config = plan.model, plan.config
    check_free(model, name)
    bank = model.__dict__.get(BANK) or _new_bank(model)
    if bank.merged is not None:
        raise AdapterStateError("adapters are merged into the base: unmerge() first")
    places = _places(model)
    for target, begin in zip(plan.targets, starts, strict=True):
        layer = bank.layers.get(target.name) or _wrap(bank, target, places)
        where, computes_in = layer.place()
        dtype = computes_in if config.dtype == "base" else torch.float32
        # Contiguous, as a resumed run's are: another order in memory would round its products otherwise.
        place = {"device": where, "dtype": dtype, "copy": True, "memory_format": torch.contiguous_format}
        options = Options(config.rslora, config.dropout, config.dora, config.lora_bias, begin.changes_base)
        shapes = layer.factor_shapes(target.rank if begin.rank is None else begin.rank)
        lora_A, lora_B = (f.to(**place).reshape(shape) for f, shape in zip((begin.lora_A, begin.lora_B), shapes))
        layer.add(name, lora_A, lora_B, alpha=target.alpha if begin.alpha is None else begin.alpha, options=options)
        layer.lora_A[name].requires_grad_(not config.lora_fa)
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
        bank.model.get_parameter(path).requires_grad_(trained)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Merge the active adapters into the weights for good and take the bank off; the model is the base's kind again.

    Raises `AdapterStateError` where `Bank.merge` does. A head whose weight was shared with an embedding and is not any
    more (only one of the two was adapted) is untied in the model's config too.
    """
    bank = get_bank(model)
    outer, model = model, bank.model
    gained = biases_gained(bank)
    bank.merge()
    if gained and hasattr(model, "save_pretrained"):
        warnings.warn(
            f"{len(gained)} merged layers, first {gained[0]}, have a bias now (lora_bias), which {type(model).__name__} "
            f"does not have there: the model is right in memory, but from_pretrained drops those biases",
            stacklevel=2,
        )
    bank.routing.stack, bank._originals = {}, {}  # whole modules and biases that are swapped in stay
    _unwrap(bank)
    head, embedding = output_head(model), input_embedding(model)
    config = getattr(model, "config", None)
    if head is not None and embedding is not None and getattr(config, "tie_word_embeddings", False):
        if head.weight is not embedding.weight:
            if torch.equal(head.weight, embedding.weight):
                head.weight = embedding.weight
            else:
                for part in (config, config.get_text_config()):
                    part.tie_word_embeddings = False
                for twin in embedding_twins(model, embedding):  # an untied model's checkpoint has each on its own
                    twin.weight = nn.Parameter(twin.weight.detach().clone(), twin.weight.requires_grad)
    return outer


def biases_gained(bank: Bank) -> list[str]:
    """The layers without a bias to which merging the active adapters would give one."""
    return [p for p, layer in bank.layers.items() if layer.lora_bias.keys() & bank.active.keys() and layer.bias is None]


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
    if not (isinstance(name, str) and NAME.fullmatch(name)):
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
    claim(bank)
    bank.undo += watch_calls(model, bank.routing)
    return bank


def _spots(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every place in the tree that holds a module; a shared module stands at several."""
    return [(parent, leaf, child) for parent in model.modules() for leaf, child in list(parent._modules.items())]


def _places(model: nn.Module) -> Places:
    """`_spots` by what they hold."""
    found: Places = defaultdict(dict)
    for parent, leaf, child in _spots(model):
        found[id(child)][id(parent), leaf] = parent
    return found


def _wrap(bank: Bank, target: Target, places: Places) -> AdaptedModule:
    if target.kind != "parameter":
        layer = _replace(bank, target.module, KINDS[target.kind].from_base(target.module, bank.routing), places)
    else:
        here = [w for w in bank.wrappers if isinstance(w, AdaptedParameters) and w.base_layer is target.module]
        make = container_for(target.module)
        container = here[0] if here else _replace(bank, target.module, make(target.module, bank.routing), places)
        layer = container.part(target.parameter)
    bank.layers[target.name] = layer
    return layer


def _replace(bank: Bank, module: nn.Module, layer: AdaptedModule, places: Places | None = None) -> AdaptedModule:
    """Put a layer everywhere that a module of the base stands; `places` are the tree's, and then the new tree's."""
    layer.train(module.training)
    places = _places(bank.model) if places is None else places
    for (_, leaf), parent in list(places[id(module)].items()):
        if parent is not layer and parent._modules.get(leaf) is module:
            setattr(parent, leaf, layer)
            if isinstance(parent, nn.TransformerEncoderLayer):
                _slow_path(bank, parent)
            places[id(layer)][id(parent), leaf] = parent
    for child, held in _places(layer).items():
        places[child].update(held)
    bank.wrappers.append(layer)
    return layer


def _slow_path(bank: Bank, block: nn.TransformerEncoderLayer) -> None:
    """Keep torch's block from its inference shortcut, which reads the weights past our layers."""
    before = block.activation_relu_or_gelu
    block.activation_relu_or_gelu = 0
    bank.undo.append(partial(setattr, block, "activation_relu_or_gelu", before))


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

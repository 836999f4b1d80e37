"""from_peft: a live PEFT model, or PEFT's configuration, becomes Veneer's."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import fields as dataclass_fields
from typing import Any

from torch import nn

from veneer.adapter import math
from veneer.adapter.attach import BANK, attach, detach
from veneer.config import AdapterConfig, InitOptions
from veneer.errors import AdapterFormatError, AdapterStateError, VeneerError
from veneer.formats.peft import put_on
from veneer.formats.peft_config import CHANGES_BASE, INIT_NAMES, adapter_config, check_supported
from veneer.formats.peft_tensors import PREFIX, slots

HANDLED = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "ensure_weight_tying"),
}
NO_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "megatron_core", "qalora_group_size"),
}
"""Fields that say nothing of what the adapter computes, or that Veneer is told in other ways (calibration data)."""
INIT_SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "eva": ("eva_config", {"rho": "eva_rho", "use_label_mask": "eva_supervised_only", "whiten": "eva_whiten"}),
    "corda": ("corda_config", {"corda_method": "corda_method"}),
    "lora_ga": (
        "lora_ga_config",
        {"direction": "lora_ga_direction", "scale": "lora_ga_scale", "stable_gamma": "lora_ga_gamma"},
    ),
    "loftq": ("loftq_config", {}),
}
"""PEFT's initialisation → the field of its settings, and their names in `InitOptions`."""
OF_FILES = {"cache_file", "covariance_file", "verbose", "prune_temporary_fields", "label_mask_value"}


def from_peft(source: Any, model: nn.Module | None = None) -> nn.Module | AdapterConfig:
    """What PEFT holds, in Veneer.

    - A live `PeftModel` (or a transformers model with PEFT's adapters) → the base model object in it, with a bank of its
      adapters: the same names, weights, active ones, requires_grad, whole modules and biases. No files, no hub. The
      `PeftModel` is empty afterwards, as after its own `unload()`.
    - A `LoraConfig` and a model → the model, with a new adapter of that configuration attached.
    - A `LoraConfig` alone → the `AdapterConfig` that says the same.

    If it fails, the model is as it was. Raises `AdapterFormatError` for a field or a kind of adapter that Veneer cannot
    hold, by its name, and `AdapterStateError` for a state that it cannot take over (merged adapters).
    """
    if isinstance(source, nn.Module):
        if model is not None:
            raise AdapterStateError("from_peft takes a PEFT model alone, or a LoraConfig and a model")
        return _convert(source)
    if not hasattr(source, "peft_type"):
        raise AdapterStateError(f"from_peft takes a PeftModel or a LoraConfig, not {type(source).__name__}")
    config = _config(source, model)
    if model is None:
        return config
    attach(model, config)
    return model


def _fields(config: Any) -> dict[str, Any]:
    """A LoraConfig's fields as adapter_config.json has them; `AdapterFormatError` for one that Veneer cannot hold."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    fields = config.to_dict() | {"peft_type": kind}
    check_supported(fields | {"init_lora_weights": True}, "PEFT's configuration")
    defaults = type(config)().to_dict()
    known = {field.name for field in dataclass_fields(config)}
    for key in sorted(known - HANDLED - NO_EFFECT):
        if fields.get(key) != defaults.get(key) and fields.get(key):
            raise AdapterFormatError(f"PEFT's configuration: {key}={fields[key]!r} is nothing that Veneer can hold")
    return fields


def _config(source: Any, model: nn.Module | None) -> AdapterConfig:
    """The `AdapterConfig` for a new adapter."""
    fields = _fields(source)
    targets, layers = fields["target_modules"], fields["layers_to_transform"]
    if targets is None and not (fields.get("target_parameters") or fields.get("trainable_token_indices")):
        fields["target_modules"] = _default_targets(model)
    elif targets in ("attention", "mlp"):
        fields["target_modules"] = f"(?:{targets})"  # a regular expression to PEFT, a preset to Veneer
    if model is not None and fields["modules_to_save"]:
        fields["modules_to_save"] = [
            name for name, _ in model.named_modules() if name.endswith(tuple(fields["modules_to_save"]))
        ]  # PEFT's rule; Veneer's wants whole parts of a name
    config = adapter_config(fields | {"init_lora_weights": True}, "PEFT's configuration")
    exclude = fields["exclude_modules"]
    try:
        config.layers = [layers] if isinstance(layers, int) else layers
        config.exclude_modules = sorted(exclude) if isinstance(exclude, (set, list)) else exclude
        config.init, config.init_options = _init(source)
    except VeneerError as error:
        raise AdapterFormatError(f"PEFT's configuration: {error}") from None
    return config


def _init(source: Any) -> tuple[str, InitOptions]:
    """How A and B start, with the settings of that initialisation."""
    init = source.init_lora_weights
    if init is False:
        raise AdapterFormatError("init_lora_weights=False (random factors) is a test's: use True")
    if str(init).startswith("pissa_niter_"):
        return "pissa", InitOptions(pissa_iterations=int(init.removeprefix("pissa_niter_")))
    options = InitOptions()
    where, names = INIT_SETTINGS.get(init, (None, {}))
    settings = getattr(source, where) if where else None
    given = settings if isinstance(settings, dict) else vars(settings) if settings else {}
    for key, value in given.items():
        if key in names:
            setattr(options, names[key], value)
        elif key not in OF_FILES and (isinstance(settings, dict) or value != getattr(type(settings)(), key)):
            raise AdapterFormatError(f"PEFT's configuration: {where}'s {key}={value!r} has no counterpart in Veneer")
    return next((ours for ours, theirs in INIT_NAMES.items() if theirs == init), init), options


def _default_targets(model: nn.Module | None) -> list[str]:
    """What PEFT adapts of this architecture where the configuration does not say."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULTS:
        what = "needs the model too: from_peft(config, model)" if model is None else f"has none for {kind}: name them"
        raise AdapterFormatError(f"target_modules is not set, and PEFT's default {what}")
    return list(DEFAULTS[kind])


def _convert(source: nn.Module) -> nn.Module:
    configs = getattr(source, "peft_config", None)
    if not configs:
        raise AdapterStateError(
            "from_peft takes a PEFT model: this one has no adapter of PEFT's; use veneer.attach(model, config)"
        )
    layers = _peft_layers(source)
    if any(getattr(layer, "merged", False) for layer in layers.values()):
        raise AdapterStateError("adapters are merged into the PEFT model's weights: unmerge_adapter() first")
    parts = {}
    for name, config in configs.items():
        tensors = _live_tensors(source, name)
        flags = {key: value.requires_grad for key, value in tensors.items()}
        parts[name] = (
            _live_fields(config, name, layers) | {"modules_to_save": _live_modules(source, name)},
            tensors,
            flags,
        )
    active = source.active_adapters() if callable(source.active_adapters) else source.active_adapters
    if any(getattr(layer, "_disable_adapters", False) for layer in layers.values()):
        active = []
    root = source.base_model.model if type(source).__module__.startswith("peft.") else source
    replaced = _unwrap(root)
    marks = {key: root.__dict__.pop(key) for key in ("peft_config", "_hf_peft_config_loaded") if key in root.__dict__}
    loose = [p for path, p in root.named_parameters() if p.requires_grad and not path.endswith("bias")]
    try:
        for name, (fields, tensors, flags) in parts.items():
            bank = put_on(root, fields, tensors, name=name, source=f"PEFT's adapter {name!r}")
            for key, (value, *_) in slots(bank, name).items():
                value.requires_grad_(flags[key])
        bank.activate({name: 1.0 for name in active})
    except BaseException:
        if BANK in root.__dict__:
            detach(root)
        for parent, leaf, old in replaced:
            setattr(parent, leaf, old)
        root.__dict__ |= marks
        raise
    for parameter in loose:
        parameter.requires_grad_(True)
    return root


def _peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers by the names of the modules that they stand for."""
    prefix = PREFIX if type(model).__module__.startswith("peft.") else ""
    return {
        path.removeprefix(prefix): module
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "lora_embedding_A") and hasattr(module, "base_layer")
    }


def _live_fields(config: Any, name: str, layers: dict[str, nn.Module]) -> dict[str, Any]:
    """The fields that describe the adapter as it is: its modules by name, each with its own rank and scaling."""
    config = copy.copy(config)
    config.layers_pattern = None  # its modules are named one by one
    fields = _fields(config)
    rank, alpha, rslora = fields["r"], fields["lora_alpha"], bool(fields["use_rslora"])
    targets, ranks, alphas = [], {}, {}
    for path, layer in layers.items():
        if name not in layer.scaling:
            continue
        plain = re.sub(r"\.base_layer\b", "", path)
        if hasattr(layer, "parameter_name"):
            plain = f"{plain}.{layer.parameter_name}"
        elif plain == path:
            targets.append(plain)
        own = math.alpha_of(layer.r[name], layer.scaling[name], rslora)
        ranks |= {plain: layer.r[name]} if layer.r[name] != rank else {}
        alphas |= {plain: own} if abs(own - alpha) > 1e-9 * abs(alpha) else {}
    if str(fields["init_lora_weights"]).startswith(CHANGES_BASE):
        warnings.warn(
            f"adapter {name!r} began with init_lora_weights={fields['init_lora_weights']!r}, which changed the weights of "
            f"this base model: saved, it fits this changed base alone",
            stacklevel=4,
        )
    own = {"target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas, "init_lora_weights": True}
    return fields | own | {"exclude_modules": None, "layers_to_transform": None}


def _live_modules(model: nn.Module, name: str) -> list[str]:
    """The modules of which the adapter has a whole copy."""
    return [
        path.removeprefix(PREFIX)
        for path, module in model.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper" and name in module.modules_to_save
    ]


def _live_tensors(model: nn.Module, name: str) -> dict[str, Any]:
    """The adapter's tensors by PEFT's keys without the prefix, sharing memory and requires_grad with the live ones."""
    from peft import get_peft_model_state_dict

    state = model.state_dict(keep_vars=True)
    found = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    return {key.removeprefix(PREFIX): value for key, value in found.items()}


def _unwrap(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put the base's own modules in the places of PEFT's; returns what stood there: (parent, name, PEFT's module)."""

    def is_wrapper(module: nn.Module) -> bool:
        names = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("peft.")}
        return bool(names & {"BaseTunerLayer", "AuxiliaryTrainingWrapper"})

    replaced = []
    for parent in [module for module in model.modules() if not is_wrapper(module)]:
        for leaf, child in list(parent._modules.items()):
            new = child
            while is_wrapper(new):
                new = new.base_layer if hasattr(type(new), "get_base_layer") else new.original_module
            if new is not child:
                replaced.append((parent, leaf, child))
                setattr(parent, leaf, new)
    return replaced

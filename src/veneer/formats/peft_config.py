"""PEFT's adapter_config.json, both ways: LoraConfig's fields ↔ `AdapterConfig`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from veneer.adapter import math
from veneer.adapter.bank import Bank
from veneer.adapter.layers import ParameterFactors
from veneer.adapter.targets import candidates, kind_of, layer_index, linears, matches_pattern, output_head, short_form
from veneer.adapter.task import task_type
from veneer.config import AdapterConfig
from veneer.errors import AdapterFormatError, VeneerError
from veneer.formats.peft_tensors import attention_output

UNSUPPORTED = {
    "layer_replication": "layer replication",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
}
INIT_NAMES = {"kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
"""PEFT's initialisations that change the base; one that was saved under such a name was not converted."""


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    return pattern


LARGEST = 1e30  # float32 holds it, and its product with a factor
Pattern = Annotated[str, AfterValidator(_compiles)]
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]


class Fields(BaseModel):
    """The types of those fields of LoraConfig that decide what an adapter computes; the file may hold more."""

    model_config = ConfigDict(strict=True)
    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    lora_dropout: float | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = None
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, Alpha] | None = None
    target_modules: Pattern | list[str] | None = None
    exclude_modules: Pattern | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Pattern | list[Pattern] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    alora_invocation_tokens: list[int] | None = None


def check_types(fields: dict[str, Any], source: object) -> None:
    """Raise `AdapterFormatError` for a field whose value LoraConfig could not have written."""
    try:
        Fields(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        key, why = first["loc"][0], first["msg"].removeprefix("Value error, ")
        raise AdapterFormatError(f"{source}: {key} is damaged: {why}") from None


def peft_config(bank: Bank, name: str, base_name: str | None) -> dict[str, Any]:
    """LoraConfig's fields for an adapter; layers, presets and regular expressions become the names they select.

    Over an initialisation that changes the base, the adapter is written as the plain LoRA of twice the rank that works
    on the base itself; alpha is chosen so that the scaling stays.
    """
    entry = bank.entries[name]
    config = entry.config
    parameters = [path for path in entry.targets if isinstance(bank.layers[path], ParameterFactors)]
    modules = [path for path in entry.targets if path not in parameters and not attention_output(bank, path)]
    rank, alpha, rank_pattern, alpha_pattern = _written_ranks(bank, name)
    return {
        "peft_type": "LORA",
        "task_type": task_type(bank.model, entry.modules),
        "base_model_name_or_path": base_name,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": config.bias,
        "target_modules": short_form(bank.model, modules) if modules else [],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "modules_to_save": list(entry.modules) or None,
        "init_lora_weights": config.lora_bias or INIT_NAMES.get(config.init, True),  # PEFT: no other with lora_bias
        "fan_in_fan_out": any(type(bank.owner(path)).__name__ == "Conv1D" for path in modules),
        "lora_bias": config.lora_bias,
        "target_parameters": parameters or None,
        "trainable_token_indices": {path: bank.tokens[path].indices[name] for path in entry.tokens} or None,
        "ensure_weight_tying": config.tied_head == "both",
        "alora_invocation_tokens": config.invocation,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _written_ranks(bank: Bank, name: str) -> tuple[int, float, dict[str, int], dict[str, float]]:
    """(r, lora_alpha, rank_pattern, alpha_pattern) that give each layer the rank and scaling it is written with.

    The configuration's own values where they do, else whole module names as patterns: the file's keys are sorted, which
    changes the first match where patterns overlap.
    """
    entry = bank.entries[name]
    config, written = entry.config, {}
    for path in (path for path in entry.targets if not attention_output(bank, path)):
        layer = bank.layers[path]
        rank = layer.rank[name] * (2 if layer.options[name].changes_base else 1)
        written[path] = rank, math.alpha_of(rank, layer.scaling[name], config.rslora)
    sorted_patterns = (dict(sorted(pattern.items())) for pattern in (config.rank_pattern, config.alpha_pattern))
    own = config.rank, config.alpha, *sorted_patterns
    if all(_close(written[path], _resolved(path, *own)) for path in written):
        return own
    return as_patterns(written) if written else (config.rank, config.alpha, {}, {})


def as_patterns(written: dict[str, tuple[int, float]]) -> tuple[int, float, dict[str, int], dict[str, float]]:
    """(r, lora_alpha, rank_pattern, alpha_pattern) from each module's rank and alpha, with whole names as patterns."""
    values = list(written.values())
    rank, alpha = max(values, key=values.count)
    key = {path: f"^{path}" if any(other.endswith(f".{path}") for other in written) else path for path in written}
    ranks = {key[path]: r for path, (r, _) in written.items() if r != rank}
    alphas = {key[path]: _number(a) for path, (_, a) in written.items() if abs(a - alpha) > 1e-9 * alpha}
    return rank, alpha, ranks, alphas


def _resolved(path: str, rank: int, alpha: float, ranks: dict, alphas: dict) -> tuple[int, float]:
    return (
        next((r for key, r in ranks.items() if matches_pattern(key, path)), rank),
        next((a for key, a in alphas.items() if matches_pattern(key, path)), alpha),
    )


def _close(one: tuple[int, float], other: tuple[int, float]) -> bool:
    return one[0] == other[0] and abs(one[1] - other[1]) <= 1e-9 * abs(other[1])


def check_method(fields: dict[str, Any], source: object) -> None:
    """Raise `AdapterFormatError` for an adapter of another method than LoRA."""
    if fields.get("peft_type", "LORA") != "LORA":
        how = "; save it and load_adapter reads the files" if fields["peft_type"] == "TRAINABLE_TOKENS" else ""
        raise AdapterFormatError(f"{source}: a {fields['peft_type']} adapter; Veneer holds LORA{how}")


def check_supported(fields: dict[str, Any], source: object) -> None:
    """Raise `AdapterFormatError` for a kind of adapter that Veneer cannot hold."""
    check_method(fields, source)
    for key, what in UNSUPPORTED.items():
        if fields.get(key):
            raise AdapterFormatError(f"{source}: uses {what} ({key}), which Veneer does not hold")
    init = str(fields.get("init_lora_weights"))
    if init.startswith(CHANGES_BASE):
        raise AdapterFormatError(
            f"{source}: was saved with init_lora_weights={init!r}, so its factors fit a base that this initialisation "
            f"changed: save it in PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )


def adapter_config(fields: dict[str, Any], source: object) -> AdapterConfig:
    """The `AdapterConfig` of LoraConfig's fields. Raises `AdapterFormatError`."""
    check_supported(fields, source)
    init, targets = fields.get("init_lora_weights"), fields.get("target_modules")
    parameters, tokens = fields.get("target_parameters") or [], fields.get("trainable_token_indices")
    if targets is None and not (parameters or tokens):
        targets = "all-linear"
    try:
        return AdapterConfig(
            rank=fields.get("r", 8),
            alpha=fields.get("lora_alpha", 8),
            rslora=fields.get("use_rslora") or False,
            target_modules=sorted(targets) if isinstance(targets, (list, set, tuple)) else targets or [],
            target_parameters=sorted(parameters),
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            dropout=fields.get("lora_dropout") or 0.0,
            bias=fields.get("bias") or "none",
            modules_to_save=fields.get("modules_to_save") or [],
            init=init if init in INIT_NAMES else "kaiming",
            dora=fields.get("use_dora") or False,
            lora_bias=fields.get("lora_bias") or False,
            tied_head="both" if fields.get("ensure_weight_tying") else "embedding",
            trainable_tokens=tokens or None,
            invocation=fields.get("alora_invocation_tokens") or None,
        )
    except VeneerError as error:
        raise AdapterFormatError(f"{source}: {error}") from None


def peft_targets(model: nn.Module, fields: dict[str, Any]) -> set[str] | None:
    """The modules that PEFT would adapt by its rules; None where the config does not say."""

    def hit(patterns: str | list[str] | None, name: str) -> bool:
        if isinstance(patterns, str):
            return re.fullmatch(patterns, name) is not None
        return any(name == p or name.endswith("." + p) for p in patterns or ())

    wanted = fields.get("target_modules")
    if not wanted:
        return None
    if wanted == "all-linear":
        head = output_head(model)
        chosen = {n for n, m in linears(model).items() if m is not head and kind_of(m) == "linear"}
    else:
        chosen = {n for n in candidates(model) if hit(wanted, n)}
    chosen = {n for n in chosen if not hit(fields.get("exclude_modules"), n)}
    named = set() if isinstance(wanted, str) else set(wanted)
    return {n for n in chosen if n in named or _in_layers(n, fields)}


def _in_layers(name: str, fields: dict[str, Any]) -> bool:
    """Whether layers_to_transform (an empty list restricts nothing) holds a module that is not named in full."""
    layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern") or []
    if layers is None or layers == []:
        return True
    index = layer_index(name)
    if patterns:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
        index = next((int(match[1]) for match in found if match), None)
    return index in ([layers] if isinstance(layers, int) else layers)

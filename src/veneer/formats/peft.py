"""PEFT's on-disk adapter format, both ways, with Veneer's provenance beside it in `veneer.json`.

`adapter_config.json` holds LoraConfig's fields; `adapter_model.safetensors` the tensors under `base_model.model.<path>`:
`.lora_A.weight` (rank, d_in), `.lora_B.weight` (d_out, rank), biases and whole modules under their own names. Scaling
is never stored: it follows from r, lora_alpha, the patterns and use_rslora.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from veneer.adapter.attach import BANK, get_bank, install
from veneer.adapter.bank import Bank
from veneer.adapter.targets import Target, layer_index, linears, matches_pattern, output_head, short_form
from veneer.base.fingerprint import Fingerprint, fingerprint, mismatch
from veneer.config import AdapterConfig
from veneer.errors import AdapterFormatError, AdapterStateError, VeneerError, WrongBaseError
from veneer.files import new_directory
from veneer.version import __version__

CONFIG, TENSORS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "veneer.json"
PREFIX = "base_model.model."
UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "fan_in_fan_out": "Conv1D layers",
}
INIT_NAMES = {"kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


def save_adapter(
    model: nn.Module, path: str | Path, *, name: str | None = None, provenance: dict[str, Any] | None = None
) -> Path:
    """Write an adapter as a directory that PEFT and Veneer load; atomic, replacing one that stands there.

    `name` may be left out where the model has one adapter. Raises `AdapterStateError`, `RunError` (disk).
    """
    bank, path = get_bank(model), Path(path)
    if name is None and len(bank.names) != 1:
        raise AdapterStateError(f"say which adapter to save, name=…: the model has {', '.join(bank.names)}")
    name = name or bank.names[0]
    if path.exists() and not (path.is_dir() and ((path / CONFIG).exists() or not any(path.iterdir()))):
        raise AdapterStateError(f"{path} exists and is no adapter directory: choose another place")
    tensors = adapter_tensors(bank, name)
    base = base_record(model)
    written = {"format": 1, "veneer": __version__, "base": base, "config": bank.entries[name].config.model_dump()}
    with new_directory(path) as folder:
        _write_json(folder / CONFIG, peft_config(bank, name, base["name_or_path"]), sort_keys=True)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        _write_json(folder / PROVENANCE, written | (provenance or {}))
    return path


def base_record(model: nn.Module) -> dict[str, Any]:
    """Which base a model is: where it came from and its fingerprint (kept after the first call)."""
    bank = model.__dict__.get(BANK)
    if bank is None:
        mark = fingerprint(model).as_dict()
    else:
        if bank.fingerprint is None:
            with bank.disabled():
                bank.fingerprint = fingerprint(model).as_dict()
        mark = bank.fingerprint
    info = getattr(model, "veneer_base", None)
    name = info.name_or_path if info else getattr(getattr(model, "config", None), "_name_or_path", None)
    return {"name_or_path": name or None, "fingerprint": mark}


def adapter_tensors(bank: Bank, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys, on the CPU."""
    targets, found = set(bank.entries[name].targets), {}
    for key, value in bank.parameters(name).items():
        path, _, leaf = key.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            key = f"{key}.weight"
        elif leaf == "bias" and path in targets:
            key = f"{path}.base_layer.bias"
        found[PREFIX + key] = value.detach().to("cpu", copy=True).contiguous()
    return found


def peft_config(bank: Bank, name: str, base_name: str | None) -> dict[str, Any]:
    """LoraConfig's fields for an adapter; layers, presets and regular expressions become the names they select."""
    entry = bank.entries[name]
    config = entry.config
    is_causal = hasattr(bank.model, "generate") and output_head(bank.model) is not None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "base_model_name_or_path": base_name,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": False,
        "bias": config.bias,
        "target_modules": short_form(bank.model, entry.targets),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules_to_save": config.modules_to_save or None,
        "init_lora_weights": INIT_NAMES[config.init],
        "fan_in_fan_out": False,
        "lora_bias": False,
    }


def load_adapter(
    model: nn.Module, path: str | Path, *, name: str = "default", force: bool = False, trainable: bool = True
) -> Bank:
    """Put a saved adapter (Veneer's or PEFT's) on a model and activate it.

    Everything is checked before the model changes. Raises `AdapterFormatError` (damaged file, missing, extra or
    mis-shaped tensors, a kind of adapter that Veneer cannot hold), `WrongBaseError` (trained on another base; `force`
    overrides) and `AdapterStateError` (name taken).
    """
    path = Path(path)
    fields, tensors = read_config(path), read_tensors(path)
    check_base(model, path, force)
    config = _adapter_config(fields, path)
    pairs, rest = _split(tensors, path)
    candidates = linears(model)
    _check_targets(model, fields, pairs, candidates, path)
    targets, factors = [], []
    for module_name in [n for n in candidates if n in pairs]:
        target, pair = _target(module_name, candidates[module_name], pairs[module_name], config, path)
        targets.append(target)
        factors.append(pair)
    rest = _without_base_copies(model, rest, config)
    _check_rest(model, rest, config, [t.name for t in targets], path)
    bank = install(model, config, targets, factors, name)
    own = bank.parameters(name)
    with torch.no_grad():
        for key, value in rest.items():
            own[key].copy_(value)
    for parameter in own.values():
        parameter.requires_grad_(trainable)
    return bank


def read_config(path: Path) -> dict[str, Any]:
    """The fields of adapter_config.json; `AdapterFormatError` if missing, broken or no LoRA that Veneer can hold."""
    if not path.is_dir():
        raise AdapterFormatError(f"{path}: no such adapter directory")
    fields = _read_json(path / CONFIG)
    if fields.get("peft_type", "LORA") != "LORA":
        raise AdapterFormatError(f"{path}: a {fields['peft_type']} adapter; Veneer holds LORA")
    for key, what in UNSUPPORTED.items():
        if fields.get(key):
            raise AdapterFormatError(f"{path}: uses {what} ({key}), which Veneer cannot hold yet")
    return fields


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of an adapter, without PEFT's prefix; `AdapterFormatError` if the file is missing or damaged."""
    file = path / TENSORS
    if not file.exists():
        pickled = " (adapter_model.bin is a pickle, which Veneer does not open: save it as safetensors with PEFT)"
        raise AdapterFormatError(f"{file} is missing{pickled if (path / 'adapter_model.bin').exists() else ''}")
    try:
        with safe_open(file, "pt") as data:
            return {key.removeprefix(PREFIX): data.get_tensor(key) for key in data.keys()}
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{file} is damaged or cut short: {error}") from None


def check_base(model: nn.Module, path: Path, force: bool) -> None:
    """Refuse an adapter whose veneer.json names another base; no file, no check."""
    if force or not (path / PROVENANCE).exists():
        return
    base = _read_json(path / PROVENANCE).get("base", {})
    if not base.get("fingerprint"):
        return
    mine = Fingerprint.from_dict(base_record(model)["fingerprint"])
    reason = mismatch(mine, Fingerprint.from_dict(base["fingerprint"]))
    if reason:
        raise WrongBaseError(
            f"{path} was trained on another base ({base.get('name_or_path') or 'unnamed'}): {reason}; "
            f"load that base, or pass force=True (--force) to use this one all the same"
        )


def _adapter_config(fields: dict[str, Any], path: Path) -> AdapterConfig:
    init = fields.get("init_lora_weights")
    targets = fields.get("target_modules")
    try:
        return AdapterConfig(
            rank=fields.get("r", 8),
            alpha=fields.get("lora_alpha", 8),
            rslora=fields.get("use_rslora") or False,
            target_modules=sorted(targets) if isinstance(targets, list) else targets or "all-linear",
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            dropout=fields.get("lora_dropout") or 0.0,
            bias=fields.get("bias") or "none",
            modules_to_save=fields.get("modules_to_save") or [],
            init=init if init in INIT_NAMES else "kaiming",
        )
    except VeneerError as error:
        raise AdapterFormatError(f"{path / CONFIG}: {error}") from None


def _split(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, value in tensors.items():
        found = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = value
        else:
            rest[key.replace(".base_layer.", ".")] = value
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise AdapterFormatError(f"{path}: {module} has {next(iter(pair))} but not its partner")
    if not pairs:
        raise AdapterFormatError(f"{path}: {TENSORS} holds no lora_A/lora_B pair")
    return pairs, rest


def _check_targets(model: nn.Module, fields: dict[str, Any], pairs: dict, candidates: dict, path: Path) -> None:
    unknown = [name for name in pairs if name not in candidates]
    if unknown:
        raise AdapterFormatError(
            f"{path}: {len(unknown)} modules are not linear layers of this model, first {unknown[0]}: wrong base?"
        )
    expected = _peft_targets(model, fields, candidates)
    if expected is None:
        return
    missing, extra = [n for n in expected if n not in pairs], [n for n in pairs if n not in expected]
    for names, what in ((missing, "tensors are missing for"), (extra, "tensors are there that the config leaves out,")):
        if names:
            raise AdapterFormatError(f"{path}: {what} {len(names)} modules, first {names[0]}")


def _peft_targets(model: nn.Module, fields: dict[str, Any], candidates: dict) -> set[str] | None:
    """The linears that PEFT would adapt by its rules; None where the config does not say."""

    def hit(patterns: str | list[str] | None, name: str) -> bool:
        if isinstance(patterns, str):
            return re.fullmatch(patterns, name) is not None
        return any(name == p or name.endswith("." + p) for p in patterns or ())

    wanted, layers = fields.get("target_modules"), fields.get("layers_to_transform")
    if not wanted:
        return None
    head = output_head(model)
    body = [n for n, m in candidates.items() if wanted != "all-linear" or m is not head]
    chosen = {n for n in body if wanted == "all-linear" or hit(wanted, n)}
    chosen = {n for n in chosen if not hit(fields.get("exclude_modules"), n)}
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        chosen = {n for n in chosen if layer_index(n) in layers}
    return chosen


def _target(
    name: str, module: nn.Linear, pair: dict[str, Tensor], config: AdapterConfig, path: Path
) -> tuple[Target, tuple[Tensor, Tensor]]:
    rank = next((r for key, r in config.rank_pattern.items() if matches_pattern(key, name)), config.rank)
    alpha = next((a for key, a in config.alpha_pattern.items() if matches_pattern(key, name)), config.alpha)
    for leaf, shape in (("lora_A", (rank, module.in_features)), ("lora_B", (module.out_features, rank))):
        if tuple(pair[leaf].shape) != shape:
            raise AdapterFormatError(
                f"{path}: {name}.{leaf} is {tuple(pair[leaf].shape)}, not {shape} as rank {rank} wants"
            )
        if not pair[leaf].isfinite().all():
            raise AdapterFormatError(f"{path}: {name}.{leaf} holds NaN or infinite values")
    return Target(name, module, rank, alpha), (pair["lora_A"], pair["lora_B"])


def _without_base_copies(model: nn.Module, rest: dict[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """PEFT also writes the frozen weight of an embedding or head that it adapts: leave out what the base has anyway."""
    own = {key.replace(".base_layer", ""): p for key, p in model.named_parameters(remove_duplicate=False)}
    heads = [m for m in (output_head(model), getattr(model, "get_input_embeddings", lambda: None)()) if m is not None]
    frozen = {id(m.weight) for m in heads}

    def is_copy(key: str, value: Tensor) -> bool:
        mine = own.get(key)
        return (
            not _is_kept(key, config)
            and id(mine) in frozen
            and mine.shape == value.shape
            and torch.equal(mine.cpu(), value.to(mine.dtype))
        )

    return {key: value for key, value in rest.items() if not is_copy(key, value)}


def _is_kept(key: str, config: AdapterConfig) -> bool:
    """Whether a tensor belongs to a module of modules_to_save."""
    owner = key.rpartition(".")[0]
    return any(f".{kept}." in f".{owner}." for kept in config.modules_to_save)


def _check_rest(
    model: nn.Module, rest: dict[str, Tensor], config: AdapterConfig, targets: list[str], path: Path
) -> None:
    shapes = {key.replace(".base_layer", ""): p.shape for key, p in model.named_parameters(remove_duplicate=False)}
    expected = set()
    for key in shapes:
        owner, _, leaf = key.rpartition(".")
        if _is_kept(key, config):
            expected.add(key)
        elif leaf == "bias" and (config.bias == "all" or config.bias == "lora_only" and owner in targets):
            expected.add(key)
    missing, extra = sorted(expected - rest.keys()), sorted(rest.keys() - expected)
    if extra:
        raise AdapterFormatError(f"{path}: {len(extra)} tensors have no place in this model, first {extra[0]}")
    if missing:
        raise AdapterFormatError(f"{path}: {len(missing)} tensors are missing, first {missing[0]}")
    for key, value in rest.items():
        if value.shape != shapes[key]:
            raise AdapterFormatError(f"{path}: {key} is {tuple(value.shape)}, the model's is {tuple(shapes[key])}")


def _write_json(path: Path, values: dict[str, Any], sort_keys: bool = False) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFormatError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterFormatError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise AdapterFormatError(f"{path} is damaged: not an object")
    return values

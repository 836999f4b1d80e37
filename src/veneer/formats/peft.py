"""PEFT's on-disk adapter format, both ways, with Veneer's provenance beside it in `veneer.json`.

`adapter_config.json` holds LoraConfig's fields (`formats.peft_config`), `adapter_model.safetensors` the tensors
(`formats.peft_tensors`). Scaling is never stored: it follows from r, lora_alpha, the patterns and use_rslora.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn

from veneer.adapter.attach import BANK, Plan, check_model, get_bank, install
from veneer.adapter.bank import Bank, saved_buffers
from veneer.adapter.init import Start
from veneer.adapter.layers import plain
from veneer.adapter.targets import (
    Target,
    base_parameters,
    candidates,
    input_embedding,
    kind_of,
    output_head,
    plain_name,
    rank_and_alpha,
    target_parameters,
    with_parts,
)
from veneer.adapter.vocabulary import add_tokens
from veneer.base.fingerprint import Fingerprint, fingerprint, mismatch
from veneer.config import AdapterConfig
from veneer.errors import AdapterFormatError, AdapterStateError, TargetError, WrongBaseError
from veneer.files import new_directory, read_object
from veneer.formats.peft_config import adapter_config, check_supported, check_types, peft_config, peft_targets
from veneer.formats.peft_tensors import PREFIX, adapter_tensors, resolve_paths, split
from veneer.formats.peft_tokens import PEFT_TYPE, as_lora_fields, as_lora_key, without_lora
from veneer.version import __version__

CONFIG, TENSORS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "veneer.json"


def save_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    provenance: dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write an adapter as a directory that PEFT and Veneer load; atomic, replacing one that stands there.

    `name` may be left out where the model has one adapter. `tokenizer` is written too if the adapter brings new tokens.
    Raises `AdapterStateError`, `RunError` (disk).
    """
    bank, path = get_bank(model), Path(path)
    if name is None and len(bank.names) > 1:
        raise AdapterStateError(f"say which adapter to save, name=…: the model has {', '.join(bank.names)}")
    name = name or next(iter(bank.names), "default")
    bank.check(name)
    if path.exists() and not (path.is_dir() and ((path / CONFIG).exists() or not any(path.iterdir()))):
        raise AdapterStateError(f"{path} exists and is no adapter directory: choose another place")
    base = base_record(bank.model)
    fields, tensors = peft_config(bank, name, base["name_or_path"]), adapter_tensors(bank, name)
    fields, tensors = without_lora(fields, tensors, tied_head(model))
    written = {"format": 1, "veneer": __version__, "base": base, "config": bank.entries[name].config.model_dump()}
    with new_directory(path) as folder:
        write_json(folder / CONFIG, fields, sort_keys=True)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        write_json(folder / PROVENANCE, written | (provenance or {}))
        if tokenizer is not None and bank.entries[name].config.new_tokens:
            tokenizer.save_pretrained(folder)
    return path


def base_record(model: nn.Module) -> dict[str, Any]:
    """Which base a model is: where it came from, how it is quantised, and its fingerprint (kept after the first call)."""
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
    return {"name_or_path": name or None, "quant": getattr(info, "quant", None), "fingerprint": mark}


def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    force: bool = False,
    trainable: bool = True,
    tokenizer: Any = None,
) -> Bank:
    """Put a saved adapter (Veneer's or PEFT's) on a model and activate it; `tokenizer` gets the tokens it brings.

    Everything is checked before the model changes. Raises `AdapterFormatError` (damaged file, missing, extra or
    mis-shaped tensors, a kind of adapter that Veneer cannot hold), `WrongBaseError` (trained on another base; `force`
    overrides) and `AdapterStateError` (name taken).
    """
    check_model(model)
    path = Path(path)
    fields, tensors = read_config(path), read_tensors(path)
    new_tokens = new_tokens_of(path)
    if new_tokens and tokenizer is not None:
        add_tokens(model, tokenizer, new_tokens)
    elif new_tokens:
        raise AdapterStateError(f"{path} brings new tokens, first {new_tokens[0]!r}: pass tokenizer=… to add them to")
    check_base(model, path, force)
    bank = put_on(model, fields, tensors, name=name, trainable=trainable, source=path)
    bank.entries[name].config = bank.entries[name].config.model_copy(update={"new_tokens": new_tokens})
    return bank


def new_tokens_of(path: Path) -> list[str]:
    """The tokens that an adapter adds to its base's vocabulary."""
    return list((read_provenance(path).get("config") or {}).get("new_tokens") or [])


def put_on(
    model: nn.Module,
    fields: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    name: str = "default",
    trainable: bool = True,
    source: object = "the adapter",
) -> Bank:
    """`load_adapter` from LoraConfig's fields and the tensors by PEFT's keys without the prefix; `source` is for errors."""
    config = _with_kept_modules(model, adapter_config(fields, source), tensors)
    factors, rows, rest = split(tensors)
    parts = _targetable(model, config, source)
    pairs = resolve_paths(factors, [n for n, (_, kind) in parts.items() if kind == "parameter"])
    if config.tied_head == "both":
        pairs = _without_tied_copies(model, pairs)
    if not (pairs or rows):
        raise AdapterFormatError(f"{source}: {TENSORS} holds no lora_A/lora_B pair")
    _check_targets(model, fields, config, pairs, parts, source)
    owner = {f"{path}.out_proj": path for path, (_, kind) in parts.items() if kind == "attention"}
    ranks = {path: rank_and_alpha(owner.get(path, path), config) for path in pairs if path in parts}
    targets = [_target(path, *parts[path], pairs[path], ranks[path], config, source) for path in parts if path in pairs]
    twice = {f"{t.name}.out_proj" for t in targets if t.kind == "attention"}  # see peft_tensors.stored_factor
    starts = [
        Start(pairs[t.name]["lora_A"], pairs[t.name]["lora_B"], rank=t.rank, alpha=t.alpha * (1 + (t.name in twice)))
        for t in targets
    ]
    try:
        plan = Plan(model, config, targets, saved=True)
    except TargetError as error:
        raise AdapterFormatError(f"{source}: {error}") from None
    tied = tied_head(model)  # PEFT may write the rows of an embedding a second time under its name
    rows = {path: value for path, value in rows.items() if path in plan.tokens or path != tied}
    rest = _without_base_copies(model, rest, config)
    _check_rest(model, rest, rows, plan, source)
    bank = install(plan, starts, name)
    with torch.no_grad():
        for key, parameter in bank.parameters(name).items():
            path, _, leaf = key.rpartition(".")
            value = rows[path] if leaf == "trainable_tokens" else pairs.get(path, {}).get(leaf, rest.get(key))
            parameter.copy_(value.reshape(parameter.shape))
            parameter.requires_grad_(trainable)
        for key, buffer in bank.buffers(name).items():
            buffer.copy_(rest[key])
    return bank


def read_config(path: Path) -> dict[str, Any]:
    """LoraConfig's fields from adapter_config.json; `AdapterFormatError` if missing, broken or not what Veneer can hold."""
    if not path.is_dir():
        raise AdapterFormatError(f"{path}: no such adapter directory")
    fields = read_object(path / CONFIG)
    if fields.get("peft_type") == PEFT_TYPE:
        fields = as_lora_fields(fields, path)
    check_supported(fields, path)
    check_types(fields, path / CONFIG)
    return fields


def read_provenance(path: Path) -> dict[str, Any]:
    """What veneer.json notes of an adapter, empty without one; `AdapterFormatError` if it is damaged."""
    file = path / PROVENANCE
    record = read_object(file) if file.exists() else {}
    base = record.get("base") or {}
    if not (isinstance(base, dict) and isinstance(base.get("fingerprint") or {}, dict)):
        raise AdapterFormatError(f"{file} is damaged: base is no object")
    config = record.get("config") or {}
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{file} is damaged: config is no object")
    tokens = config.get("new_tokens") or []
    if not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
        raise AdapterFormatError(f"{file} is damaged: new_tokens is no list of texts")
    return record


def read_tensors(path: Path, mapped: bool = True) -> dict[str, Tensor]:
    """All tensors of an adapter, without PEFT's prefix; `AdapterFormatError` if the file is missing or damaged.

    `mapped` ones are the file's own bytes, read when they are looked at: they change with the file, and a file that is
    cut short ends the process. Others are a copy.
    """
    file = path / TENSORS
    if not file.exists():
        pickled = " (adapter_model.bin is a pickle, which Veneer does not open: save it as safetensors with PEFT)"
        raise AdapterFormatError(f"{file} is missing{pickled if (path / 'adapter_model.bin').exists() else ''}")
    try:
        if mapped:
            with safe_open(file, "pt") as data:
                tensors = {key: data.get_tensor(key) for key in data.keys()}
        else:
            tensors = dict(sorted(load(file.read_bytes()).items()))  # which come in any order
        return {as_lora_key(key.removeprefix(PREFIX)): _readable(value) for key, value in tensors.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise AdapterFormatError(f"{file} is damaged or cut short: {error}") from None


def _readable(value: Tensor) -> Tensor:
    """8-bit floats, which have no arithmetic, as float32, which holds them exactly; any other tensor as it is."""
    return value.float() if value.is_floating_point() and value.dtype.itemsize == 1 else value


def check_values(value: Tensor, what: str, source: object) -> None:
    """Raise `AdapterFormatError` unless a tensor is of finite floating-point numbers."""
    if not value.is_floating_point():
        dtype = str(value.dtype).removeprefix("torch.")
        raise AdapterFormatError(f"{source}: {what} is {dtype}, no floating-point numbers")
    if not value.isfinite().all():
        raise AdapterFormatError(f"{source}: {what} holds NaN or infinite values")


def check_base(model: nn.Module, path: Path, force: bool | None, mine: Fingerprint | None = None) -> None:
    """Refuse an adapter whose veneer.json names another base; no file, no check. `force` None: who asks cannot. `mine` spares
    reading the model."""
    base = {} if force else read_provenance(path).get("base") or {}
    if not base.get("fingerprint"):
        return
    reason = mismatch(
        mine or Fingerprint.from_dict(base_record(model)["fingerprint"]), Fingerprint.from_dict(base["fingerprint"])
    )
    if reason:
        raise WrongBaseError(
            f"{path} was trained on another base ({base.get('name_or_path') or 'unnamed'}): {reason}; "
            f"load that base" + ("" if force is None else ", or pass force=True (--force) to use this one all the same")
        )


def _with_kept_modules(model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor]) -> AdapterConfig:
    """modules_to_save by full names.

    PEFT takes every module whose name ends in an entry's letters ("norm": input_layernorm too), and writes the names of
    all heads that a task may have: those that neither the model nor the tensors have are left out.
    """
    names = [plain_name(name) for name, _ in model.named_modules()]
    kept: dict[str, None] = {}
    for entry in config.modules_to_save:
        alike = [n for n in names if n.endswith(entry)]
        whole = [n for n in alike if n == entry or n.endswith(f".{entry}")]
        held = [n for n in alike if any(key.startswith(f"{n}.") for key in tensors)]
        held = alike if set(held) - set(whole) else held  # if one by its last letters, all, as in PEFT: none was lost
        unknown = [entry] if not (held or whole) and any(f".{entry}." in f".{key}" for key in tensors) else []
        kept |= dict.fromkeys([*whole, *held, *unknown])
    return config.model_copy(update={"modules_to_save": list(kept)})


def _targetable(model: nn.Module, config: AdapterConfig, source: object) -> dict[str, tuple[nn.Module, str]]:
    """Everything that factors may belong to: name → (module, kind)."""
    found = {}
    for name, module in candidates(model).items():
        found |= {part: (inner, kind) for part, inner, kind in with_parts(name, module, kind_of(module))}
    try:
        return found | {name: (module, kind) for name, module, kind in target_parameters(model, config)}
    except TargetError as error:
        raise AdapterFormatError(f"{source}: {error}") from None


def _without_tied_copies(model: nn.Module, pairs: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """PEFT writes the factors of a tied head, transposed, beside the embedding's: one of the two is enough."""
    head = output_head(model)
    name = next((plain_name(n) for n, m in model.named_modules() if m is head), None)
    return {path: pair for path, pair in pairs.items() if path != name}


def tied_head(model: nn.Module) -> str | None:
    """The name of the output head if its weight is the input embedding's."""
    head, embedding = output_head(model), input_embedding(model)
    if head is None or embedding is None or plain(head).weight is not plain(embedding).weight:
        return None
    return next(plain_name(name) for name, module in model.named_modules() if module is head)


def _check_targets(
    model: nn.Module, fields: dict[str, Any], config: AdapterConfig, pairs: dict, parts: dict, source: object
) -> None:
    unknown = [name for name in pairs if name not in parts]
    if unknown:
        raise AdapterFormatError(
            f"{source}: {len(unknown)} modules are none that can be adapted in this model, first {unknown[0]}: wrong base?"
        )
    expected = peft_targets(model, fields)
    if expected is None:
        return
    expected = {name for name in expected if not _is_kept(f"{name}.weight", config)}  # kept whole wins, as in PEFT
    expected |= {name for name, (_, kind) in parts.items() if kind == "parameter"}
    expected -= {tied_head(model)} if config.tied_head == "both" else set()
    expected |= {f"{name}.out_proj" for name in expected if parts[name][1] == "attention"}
    missing, extra = [n for n in expected if n not in pairs], [n for n in pairs if n not in expected]
    for names, what in ((missing, "tensors are missing for"), (extra, "tensors are there that the config leaves out,")):
        if names:
            raise AdapterFormatError(f"{source}: {what} {len(names)} modules, first {names[0]}")


def _target(
    name: str,
    module: nn.Module,
    kind: str,
    pair: dict[str, Tensor],
    rank: tuple[int, float],
    config: AdapterConfig,
    source: object,
) -> Target:
    target = Target(name, module, *rank, kind)
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.dora else set())
    wanted |= {"lora_bias"} if config.lora_bias else set()
    if pair.keys() != wanted:
        odd = sorted(pair.keys() ^ wanted)[0]
        raise AdapterFormatError(f"{source}: {name} {'lacks' if odd in wanted else 'has an unexpected'} {odd}")
    for leaf, shape in zip(("lora_A", "lora_B"), target.layer().factor_shapes(target.rank)):
        if tuple(pair[leaf].shape) != shape:
            raise AdapterFormatError(
                f"{source}: {name}.{leaf} is {tuple(pair[leaf].shape)}, not {shape} as rank {target.rank} wants"
            )
    for leaf, value in pair.items():
        check_values(value, f"{name}.{leaf}", source)
        if leaf not in ("lora_A", "lora_B") and value.numel() != target.d_out:
            raise AdapterFormatError(f"{source}: {name}.{leaf} has {value.numel()} values, not {target.d_out}")
    return target


def _without_base_copies(model: nn.Module, rest: dict[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """PEFT also writes the frozen weight of an embedding or head that it adapts: leave out what the base has anyway."""
    own = base_parameters(model)
    heads = [m for m in (output_head(model), input_embedding(model)) if m is not None]
    frozen = {id(getattr(plain(m), "weight", None)) for m in heads}  # an image model's patches have none

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


def _check_rest(model: nn.Module, rest: dict[str, Tensor], rows: dict[str, Tensor], plan: Plan, source: object) -> None:
    parameters = base_parameters(model)
    buffers = {f"{path}.{k}": v for path, m in plan.modules.items() for k, v in saved_buffers(m).items()}
    shapes = {key: value.shape for key, value in (parameters | buffers).items()}
    expected = {key for key in shapes if _is_kept(key, plan.config)} | set(plan.biases)
    missing, extra = sorted(expected - rest.keys()), sorted(rest.keys() - expected)
    missing += [path for path in plan.tokens if path not in rows]
    extra += [path for path in rows if path not in plan.tokens]
    if extra:
        raise AdapterFormatError(f"{source}: {len(extra)} tensors have no place in this model, first {extra[0]}")
    if missing:
        raise AdapterFormatError(f"{source}: {len(missing)} tensors are missing, first {missing[0]}")
    wanted = {path: (len(ids), m.weight.shape[1]) for path, (m, ids) in plan.tokens.items()}
    for key, value in (rest | rows).items():
        shape = tuple(wanted.get(key, shapes.get(key, ())))
        if tuple(value.shape) != shape:
            raise AdapterFormatError(f"{source}: {key} is {tuple(value.shape)}, the model's is {shape}")
        if key in parameters or key in rows:
            check_values(value, key, source)


def write_json(path: Path, values: dict[str, Any], sort_keys: bool = False) -> None:
    """Write one of an adapter's JSON files."""
    path.write_text(json.dumps(values, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")

"""What an adapter would be on a model, in numbers, from the model's configuration alone.

The adapter is really attached, to a model without weights (`base.skeleton`), by the code that attaches it to one with
weights: so what is said here is what `attach` does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter.attach import check_config, install, planned
from veneer.adapter.bank import Bank
from veneer.adapter.frozen import is_conv1d
from veneer.adapter.init import Start, check
from veneer.adapter.layers import AdaptedModule
from veneer.adapter.math import scaling
from veneer.adapter.scope import Plan
from veneer.adapter.targets import Target, output_head
from veneer.base.catalog import CATALOG, fetched
from veneer.base.load import load_tokenizer
from veneer.base.skeleton import skeleton, stored_quantisation
from veneer.config import AdapterConfig
from veneer.errors import BaseModelError, ConfigError
from veneer.formats.peft import tied_head
from veneer.formats.peft_config import CHANGES_BASE, peft_config
from veneer.formats.peft_tensors import adapter_tensors
from veneer.formats.peft_tokens import without_lora
from veneer.plan import bytes as size
from veneer.plan.left_out import LeftOut, left_out

NAME = "default"
FORMAT_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class TargetNumbers:
    """One adapted module or parameter: W (d_out × d_in), its factors in PEFT's shapes, and how many numbers each has.

    `experts` is above 1 for fused experts, whose W is so many matrices. `lora_parameters` is what the adapter holds here
    (A, B, DoRA's magnitudes, the bias); `trained_parameters` of those, what is trained.
    """

    name: str
    kind: str
    d_out: int
    d_in: int
    experts: int
    lora_A: tuple[int, ...]
    lora_B: tuple[int, ...]
    rank: int
    alpha: float
    scaling: float
    full_parameters: int
    lora_parameters: int
    trained_parameters: int

    @property
    def reduction(self) -> float:
        """By how much the adapter is smaller than W: 0.992 is 99.2 % fewer numbers."""
        return 1 - self.lora_parameters / self.full_parameters

    @property
    def ending(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"reduction": self.reduction}


@dataclass(frozen=True)
class Explanation:
    """What `explain` finds; sizes in bytes.

    `trained_by_part` splits the trained numbers: lora_A, lora_B, lora_magnitude_vector, lora_bias, trainable_tokens,
    modules_to_save, bias. `memory` is by way of training: full, lora, qlora.
    """

    model: str
    architecture: str
    model_type: str
    dtype: str
    adapter: dict[str, Any]
    trainable_parameters: int
    base_parameters: int
    total_parameters: int
    adapter_bytes: int
    model_bytes: int
    trained_by_part: dict[str, int]
    targets: list[TargetNumbers]
    left_out: list[LeftOut]
    memory: dict[str, size.Memory]
    scalings: list[dict[str, float]]
    notes: list[str]

    @property
    def share(self) -> float:
        """Trained share of all parameters, 0 to 1, as `attach` reports it."""
        return self.trainable_parameters / self.total_parameters

    def groups(self) -> list[dict[str, Any]]:
        """The targets that are alike but for their place, by name ending, with their count."""
        found: dict[tuple, list[TargetNumbers]] = {}
        for t in self.targets:
            key = t.ending, t.kind, t.d_out, t.d_in, t.experts, t.rank, t.scaling, t.lora_parameters
            found.setdefault(key, []).append(t)
        return [
            {k: v for k, v in same[0].as_dict().items() if k != "name"}
            | {"name": same[0].ending, "modules": len(same)}
            | {f"total_{k}": sum(getattr(t, k) for t in same) for k in ("full_parameters", "lora_parameters")}
            for same in found.values()
        ]

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {
            "share": self.share,
            "targets": [t.as_dict() for t in self.targets],
            "groups": self.groups(),
            "memory": {way: memory.as_dict() for way, memory in self.memory.items()},
        }


def explain(name_or_path: str | Path, config: AdapterConfig | None = None, *, dtype: str = "auto") -> Explanation:
    """What `attach` with `config` would do to a model, from its configuration alone: see `skeleton` for what may be named.

    `dtype` is the base's (float32, bfloat16, float16; auto: as the configuration says). Raises what `skeleton` and
    `attach` raise: `BaseModelError`, `TargetError`, `ConfigError`.
    """
    if not isinstance(name_or_path, (str, Path)):
        raise BaseModelError(f"explain takes a model's name or path, not a {type(name_or_path).__name__}")
    config, name = check_config(config or AdapterConfig()), str(name_or_path)
    model = skeleton(name, dtype=dtype)
    notes = _notes(model, config)
    if config.adalora is not None:
        config = config.model_copy(update={"adalora": None})
    with torch.device("meta"):
        plan = planned(model, config, tokenizer=_tokenizer(name, config))
    for target in plan.targets:
        check(target, config, quantised=config.init == "loftq")
    out, base = left_out(plan), {id(p): p for p in model.parameters()}.values()
    numbers, model_bytes = sum(p.numel() for p in base), sum(p.numel() * p.element_size() for p in base)
    packed = _quantisable(model)
    bank = install(plan, [_blank(target, config) for target in plan.targets], NAME)
    report = bank.report(NAME)
    return Explanation(
        model=name,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        dtype=str(next(iter(base)).dtype).removeprefix("torch."),
        adapter=config.model_dump(),
        trainable_parameters=report.trainable_parameters,
        base_parameters=numbers,
        total_parameters=report.total_parameters,
        adapter_bytes=_file_size(bank),
        model_bytes=model_bytes,
        trained_by_part=_by_part(bank),
        targets=[_numbers(target, bank.layers[target.name]) for target in plan.targets],
        left_out=out,
        memory=_memory(bank, numbers, model_bytes, packed),
        scalings=scalings(config.rank, config.alpha),
        notes=notes + _plan_notes(plan, out),
    )


def scalings(rank: int, alpha: float) -> list[dict[str, float]]:
    """s = alpha/rank and alpha/√rank (rsLoRA) for ranks and alphas around the chosen ones."""
    ranks = sorted({max(1, rank // 4), max(1, rank // 2), rank, 2 * rank, 4 * rank})
    return [
        {"rank": r, "alpha": a, "scaling": scaling(r, a), "rslora_scaling": scaling(r, a, True)}
        for r in ranks
        for a in (alpha / 2, alpha, alpha * 2)
    ]


def _tokenizer(name: str, config: AdapterConfig) -> Any:
    if not (config.new_tokens or isinstance(config.invocation, str)):
        return None
    if name in CATALOG and fetched(name) is None:
        raise ConfigError(f"new_tokens and a textual invocation need the tokenizer, and {name} is not fetched yet")
    return load_tokenizer(Path(name).parent if Path(name).name == "config.json" else name)


def _blank(target: Target, config: AdapterConfig) -> Start:
    lora_A, lora_B = (torch.empty(shape, device="meta") for shape in target.layer().factor_shapes(target.rank))
    return Start(lora_A, lora_B, changes_base=config.init in CHANGES_BASE)


def _numbers(target: Target, layer: AdaptedModule) -> TargetNumbers:
    held = layer.trained(NAME)
    return TargetNumbers(
        name=target.name,
        kind=target.kind,
        d_out=layer.d_out,
        d_in=layer.d_in,
        experts=getattr(layer, "experts", 1) if target.kind == "parameter" else 1,
        lora_A=tuple(layer.lora_A[NAME].shape),
        lora_B=tuple(layer.lora_B[NAME].shape),
        rank=layer.rank[NAME],
        alpha=layer.alpha[NAME],
        scaling=layer.scaling[NAME],
        full_parameters=layer.weight.numel(),
        lora_parameters=sum(p.numel() for p in held.values()),
        trained_parameters=sum(p.numel() for p in held.values() if p.requires_grad),
    )


def _by_part(bank: Bank) -> dict[str, int]:
    entry, parts = bank.entries[NAME], {}
    for path in entry.targets:
        for table, p in bank.layers[path].trained(NAME).items():
            parts[table] = parts.get(table, 0) + p.numel() * p.requires_grad
    parts["trainable_tokens"] = sum(bank.tokens[path].lora_rows[NAME].numel() for path in entry.tokens)
    parts["modules_to_save"] = sum(p.numel() for module in entry.modules.values() for p in module.parameters())
    parts["bias"] = sum(p.numel() for p in entry.biases.values())
    return {part: count for part, count in parts.items() if count}


def _file_size(bank: Bank) -> int:
    """The size of adapter_model.safetensors as `save_adapter` writes it."""
    _, tensors = without_lora(peft_config(bank, NAME, None), adapter_tensors(bank, NAME), tied_head(bank.model))
    stored = {key: (FORMAT_DTYPES[value.dtype], tuple(value.shape)) for key, value in tensors.items()}
    return size.safetensors_size(stored, {"format": "pt"})


def _quantisable(model: nn.Module) -> list[int]:
    """Sizes of the weights that NF4 would hold: those of linears, without the output head and the last layer, which
    transformers leaves as they are (the head of a classifier, say)."""
    head, last = output_head(model), list(model.named_parameters())[-1][0].rpartition(".")[0]
    linears = {
        id(m.weight): m
        for path, m in model.named_modules()
        if (type(m) is nn.Linear or is_conv1d(m)) and m is not head and path != last
    }
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [prod(m.weight.shape) for key, m in linears.items() if key not in tied]


def _memory(bank: Bank, numbers: int, model_bytes: int, packed: list[int]) -> dict[str, size.Memory]:
    tensors = list(bank.parameters(NAME).values())
    starts = [t[NAME] for layer in bank.layers.values() for t in (layer.lora_A_start, layer.lora_B_start) if NAME in t]
    held = sum(p.numel() * p.element_size() for p in (*tensors, *starts))
    trained = sum(p.numel() * p.element_size() for p in tensors if p.requires_grad)
    nf4 = sum(map(size.nf4, packed)) + size.BFLOAT16 * (numbers - sum(packed))
    return {
        "full": size.full(numbers),
        "lora": size.adapter_only(model_bytes, held, trained),
        "qlora": size.adapter_only(nf4, held, trained),
    }


def _notes(model: nn.Module, config: AdapterConfig) -> list[str]:
    notes = []
    if stored := stored_quantisation(model.config):
        notes.append(
            f"the checkpoint is stored quantised ({stored}); shapes and sizes are of the weights it stands for"
        )
    if config.init in CHANGES_BASE:
        notes.append(f"init {config.init}: the adapter is saved with twice its rank, [A; A₀] and [B, −B₀]")
    if config.init == "eva":
        notes.append(
            "init eva: data decide each module's rank; the counts are of the even start, whose sum of ranks stays"
        )
    if config.adalora is not None:
        notes.append(
            f"adalora: the counts are of its start at rank {config.rank}, without Λ (one number a rank); training ends at "
            f"{config.adalora.target_rank} on average"
        )
    if config.lora_fa:
        notes.append("lora_fa: A is held and not trained")
    return notes


def _plan_notes(plan: Plan, out: list[LeftOut]) -> list[str]:
    experts = sum(group.parameters for group in out if group.reason.startswith("experts"))
    notes = [f"{experts:,} numbers are in fused experts, which target_modules does not reach"] if experts else []
    if plan.tied:
        notes.append(f"the output head, tied to {plan.tied}, sees its adapter too (tied_head: both)")
    return notes

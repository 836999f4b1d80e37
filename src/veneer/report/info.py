"""`veneer info`: what an adapter or a run is, from its small files and the tensors' header alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from veneer.errors import AdapterFormatError, RunError
from veneer.files import read_object
from veneer.formats.peft_config import check_method, check_types
from veneer.formats.peft_tokens import PEFT_TYPE
from veneer.report import text
from veneer.report.page import progress, score_rows
from veneer.report.run import RunFiles, is_run, mapping, read_run

CONFIG, TENSORS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "veneer.json"
TOKENS = ".trainable_tokens_delta"
FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")


@dataclass
class Info:
    """What `describe` finds; what a directory does not say is None or empty."""

    kind: Literal["adapter", "run"]
    path: str
    base: str | None = None
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    scalings: list[float] = field(default_factory=list)
    rslora: bool = False
    dora: bool = False
    targets: dict[str, int] = field(default_factory=dict)
    modules: int = 0
    modules_to_save: list[str] = field(default_factory=list)
    tokens: int = 0
    parameters: int | None = None
    bytes: int | None = None
    dtypes: list[str] = field(default_factory=list)
    steps: int | None = None
    last_loss: float | None = None
    heldout_best: float | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)
    report: str | None = None
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)


def describe(path: str | Path) -> Info:
    """Describe an adapter directory or a run directory.

    Raises `AdapterFormatError` (missing or damaged adapter files) and `RunError` (neither of the two).
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"{path}: no such directory")
    if (path / CONFIG).exists() or (path / TENSORS).exists():
        info = Info("adapter", str(path))
        _add_adapter(info, path)
        return info
    if not is_run(path):
        raise RunError(f"{path}: neither an adapter (no {CONFIG}) nor a run directory")
    run = read_run(path)
    info = Info("run", str(path), problems=list(run.problems))
    if (path / "adapter").is_dir():
        _add_adapter(info, path / "adapter")
    _add_run(info, run)
    return info


def print_info(info: Info, console: Console) -> None:
    """Print the fields that are known, one a line, then the scores."""
    table = Table.grid(padding=(0, 2))
    for name, value in _lines(info):
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)
    if info.scores:
        scores = Table(box=None, pad_edge=False, header_style="dim")
        for name, side in (("Score", "left"), ("Base", "right"), ("With adapter", "right")):
            scores.add_column(name, justify=side)
        for row in info.scores:
            name = f"  F1 of {row['name']}" if row.get("field") else row["name"]
            scores.add_row(Text(name), text.percent(row["base"]), text.percent(row["adapter"]))
        console.print()
        console.print(scores)
    for problem in info.problems:
        console.print(Text(f"warning: {problem}", style="yellow"))


def _lines(info: Info) -> list[tuple[str, str]]:
    lines = [(info.kind, info.path), ("base", info.base or text.NONE)]
    if info.modules:
        kinds = [name for name, on in (("rsLoRA", info.rslora), ("DoRA", info.dora)) if on]
        lines += [
            ("rank", _listed(info.ranks)),
            ("alpha", _listed(info.alphas)),
            ("scaling", _listed(info.scalings) + (f" ({', '.join(kinds)})" if kinds else "")),
            ("targets", ", ".join(f"{name} × {count}" for name, count in info.targets.items())),
            ("modules", text.number(info.modules)),
        ]
    if info.tokens:
        lines.append(("trained tokens", text.number(info.tokens)))
    if info.parameters:
        size = f"{text.number(info.parameters)} ({', '.join(info.dtypes)}), {text.size(info.bytes)}"
        lines.append(("parameters", size))
    elif info.kind == "run":
        lines.append(("adapter", "not saved yet"))
    if info.modules_to_save:
        lines.append(("trained in full", ", ".join(info.modules_to_save)))
    if info.steps is not None:
        lines.append(("steps", text.number(info.steps)))
    if info.last_loss is not None:
        lines.append(("training loss", f"{text.number(info.last_loss)} (smoothed)"))
    if info.heldout_best is not None:
        lines.append(("held-out loss", f"{text.number(info.heldout_best)} (best)"))
    if info.report:
        lines.append(("report", info.report))
    return lines


def _listed(values: list[Any]) -> str:
    return ", ".join(text.number(value) for value in values) or text.NONE


def _add_run(info: Info, run: RunFiles) -> None:
    done = progress(run)
    info.base = info.base or run.base_name
    info.steps, info.last_loss = done.get("steps"), done.get("last_loss")
    info.heldout_best = done.get("heldout_best")
    info.scores = score_rows(run.eval)
    report = run.path / "report.html"
    info.report = str(report) if report.exists() else None


def _add_adapter(info: Info, path: Path) -> None:
    config = read_object(path / CONFIG)
    if config.get("peft_type") != PEFT_TYPE:
        check_method(config, path)
    check_types(config, path / CONFIG)
    shapes, dtypes = _read_header(path / TENSORS)
    ranks: dict[str, float] = {}
    rest = []
    for key, shape in shapes.items():
        found = FACTOR.match(key)
        if not found:
            rest.append(key)
        elif found[3] == "A":
            if len(shape) < 2 or 0 in shape:
                raise AdapterFormatError(f"{path / TENSORS}: {key} is {shape}, no factor of a rank")
            name, fused = _module(found[1], config)
            ranks[name] = _by_pattern(config, "rank_pattern", "r", name) if fused else shape[0]
    info.tokens = sum(shapes[key][0] for key in rest if key.endswith(TOKENS))
    if not (ranks or info.tokens):
        raise AdapterFormatError(f"{path / TENSORS}: holds no lora_A tensor: not a LoRA adapter")
    info.rslora, info.dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    alphas = {name: _by_pattern(config, "alpha_pattern", "lora_alpha", name) for name in ranks}
    roots = {name: math.sqrt(rank) if info.rslora else rank for name, rank in ranks.items()}
    info.ranks = sorted(set(ranks.values()))
    info.alphas = sorted(set(alphas.values()))
    info.scalings = sorted({alphas[name] / roots[name] for name in ranks})
    info.targets = dict(Counter(name.rpartition(".")[2] for name in ranks))
    info.modules = len(ranks)
    info.modules_to_save = [str(name) for name in config.get("modules_to_save") or []]
    info.parameters = sum(math.prod(shape) for shape in shapes.values())
    info.bytes = (path / TENSORS).stat().st_size
    info.dtypes = dtypes
    noted = read_object(path / PROVENANCE) if (path / PROVENANCE).exists() else {}
    base = mapping(noted.get("base")).get("name_or_path") or config.get("base_model_name_or_path")
    info.base = str(base) if base else None


def _module(path: str, config: dict[str, Any]) -> tuple[str, bool]:
    """What factors at a path belong to, and whether it is a parameter with several experts in one tensor.

    The n-th last parameter of a module stands behind n times `.base_layer`.
    """
    plain, depth = path.replace(".base_layer", ""), path.count(".base_layer")
    owned = [str(name).rpartition(".") for name in config.get("target_parameters") or []]
    own = [leaf for owner, _, leaf in owned if f".{plain}".endswith(f".{owner}")]
    return (f"{plain}.{own[-1 - depth]}", True) if depth < len(own) else (plain, False)


def _by_pattern(config: dict[str, Any], patterns: str, default: str, name: str) -> float:
    """A module's rank or alpha by PEFT's rule: the first pattern that matches the name or its ending, else the default."""
    for pattern, value in mapping(config.get(patterns)).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return float(config.get(default, 8))


def _read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes by tensor name and the distinct dtypes, without loading a tensor."""
    if not file.exists():
        raise AdapterFormatError(f"{file} is missing")
    try:
        with safe_open(file, "pt") as data:
            slices = {key: data.get_slice(key) for key in data.keys()}
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            return shapes, sorted({part.get_dtype() for part in slices.values()})
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{file} is damaged or cut short: {error}") from None

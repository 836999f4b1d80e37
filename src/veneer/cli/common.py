"""What several commands share: opening an adapter on its base, parsing, consoles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from veneer.errors import AdapterFormatError, ConfigError, RunError
from veneer.files import read_object

err = Console(stderr=True, highlight=False)

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Base model: a known name, a directory, a GGUF file or a hub id."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
QUANT_HELP = "Quantise the base: nf4, fp4, int8, int8-torchao, int4-torchao, hqq or none."
Quant = Annotated[str | None, typer.Option(help=QUANT_HELP + " Default: as in the run.")]
Force = Annotated[bool, typer.Option("--force", help="Use the adapter even on another base than it was trained on.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")]


class Display:
    """Progress of training: a bar in a terminal, else lines; called with each record, which goes to `_<its type>`.

    `columns` is what the bar says besides steps and time.
    """

    def __init__(self, columns: str) -> None:
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn(columns), TimeRemainingColumn(),
            console=err, disable=not err.is_terminal,
        )  # fmt: skip
        self.task, self.said = None, 0.0

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        getattr(self, "_" + record["type"], lambda r: None)(record)

    def say(self, text: str, *, warning: bool) -> None:
        """A line above the bar."""
        style = "yellow" if warning else None
        self.progress.console.print(text, style=style, markup=False, soft_wrap=True)


@dataclass
class Opened:
    """An adapter (or a bare base) ready to use. `run` is the run directory it came from, if it did."""

    model: Any
    tokenizer: Any
    adapter: Path | None
    run: Path | None


def locate(path: Path) -> tuple[Path, Path | None]:
    """(adapter directory, run directory or None) of a run or an adapter; an unfinished run's newest checkpoint."""
    if (path / "adapter_config.json").exists():
        parent = path.parent
        return path, parent if (parent / "config.yaml").exists() else None
    if (path / "config.yaml").exists():
        candidates = [path / "adapter", *(c / "adapter" for c in sorted((path / "checkpoints").glob("step-*"))[::-1])]
        found = next((c for c in candidates if (c / "adapter_config.json").exists()), None)
        if found is None:
            raise RunError(f"{path} has no adapter yet: it has saved no checkpoint")
        if found != candidates[0]:
            err.print(f"the run is not finished: using {found.parent.name}", style="yellow")
        return found, path
    if not path.exists():
        raise AdapterFormatError(f"{path}: no such run or adapter directory")
    raise AdapterFormatError(f"{path} is neither a run (config.yaml) nor an adapter (adapter_config.json)")


def open_adapter(
    path: Path,
    model: str | None,
    *,
    device: str,
    dtype: str,
    force: bool,
    quant: str | None = None,
    name: str = "default",
) -> Opened:
    """Load an adapter on its base (`model` overrides which), quantised as its run was (`quant` overrides how)."""
    from veneer.base.load import load_base
    from veneer.config import TrainConfig
    from veneer.formats.peft import load_adapter

    adapter, run = locate(path)
    config = TrainConfig.load(run / "config.yaml") if run else None
    template = config.data.chat_template if config else None
    quant = quant or (config.quant if config else None)
    base, tokenizer = load_base(
        model or base_of(adapter), device=device, dtype=dtype, quant=quant, chat_template=template
    )
    load_adapter(base, adapter, name=name, force=force, trainable=False, tokenizer=tokenizer)
    base.eval()
    return Opened(base, tokenizer, adapter, run)


def base_of(adapter: Path) -> str:
    """The base that an adapter's files name."""
    for file, key in (("veneer.json", "base"), ("adapter_config.json", "base_model_name_or_path")):
        value = read_object(adapter / file).get(key) if (adapter / file).exists() else None
        value = value.get("name_or_path") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            return value
    raise AdapterFormatError(f"{adapter} does not say which base it is for: pass --model")


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`--set adapter.rank=8` pairs, values in YAML."""
    import yaml

    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, such as adapter.rank=8, not {setting!r}")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: {value!r} is not a YAML value") from None
    return values


def parse_targets(text: str | None) -> str | list[str] | None:
    """--targets: names separated by commas, or one name; a preset or a regular expression stays as it is."""
    if text and ("," in text or text.replace("_", "").isalnum() and text not in ("attention", "mlp")):
        return [part.strip() for part in text.split(",")]
    return text

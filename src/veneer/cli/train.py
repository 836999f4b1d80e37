"""veneer train"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from veneer.cli.common import QUANT_HELP, Display, err, parse_settings, parse_targets
from veneer.errors import ConfigError, RunError

FLAGS = {
    "model": "model",
    "data": "data.train",
    "heldout": "data.heldout",
    "out": "out",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "targets": "adapter.target_modules",
    "target_parameters": "adapter.target_parameters",
    "rslora": "adapter.rslora",
    "dora": "adapter.dora",
    "lora_bias": "adapter.lora_bias",
    "lora_fa": "adapter.lora_fa",
    "lora_plus": "train.lora_plus_ratio",
    "adalora": "adapter.adalora.target_rank",
    "init": "adapter.init",
    "invocation": "adapter.invocation",
    "trainable_tokens": "adapter.trainable_tokens",
    "new_tokens": "adapter.new_tokens",
    "tied_head": "adapter.tied_head",
    "lr": "train.lr",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "batch_size": "train.batch_size",
    "max_length": "data.max_length",
    "on_bad_row": "data.on_bad_row",
    "chat_template": "data.chat_template",
    "device": "device",
    "dtype": "dtype",
    "quant": "quant",
    "stream": "train.stream",
    "seed": "seed",
    "vram": "train.vram",
}

INITS = "kaiming, gaussian, orthogonal, pissa, olora, eva, corda, lora_ga, or loftq (quantised bases)"
V = {"rich_help_panel": "Variants (docs/variants.md)"}


def command(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML configuration (see `veneer init`), or a run directory with --resume.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base: a known name, a directory, a GGUF file or a hub id.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option("--data", "-d", help="Training data; may be repeated.")] = None,
    heldout: Annotated[list[str] | None, typer.Option(help="Held-out data; may be repeated.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="The run directory to make.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the update.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scaling numerator: s = alpha / rank.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="all-linear, attention, mlp, names with commas, or a regular expression.")
    ] = None,
    target_parameters: Annotated[
        list[str] | None, typer.Option(help="Fused parameters to adapt, e.g. experts.down_proj; may be repeated.", **V)
    ] = None,
    rslora: Annotated[bool | None, typer.Option("--rslora/--no-rslora", help="s = alpha / √rank.", **V)] = None,
    dora: Annotated[bool | None, typer.Option("--dora/--no-dora", help="DoRA: train row norms apart.", **V)] = None,
    lora_bias: Annotated[
        bool | None, typer.Option("--lora-bias/--no-lora-bias", help="A trained bias after B.", **V)
    ] = None,
    lora_fa: Annotated[
        bool | None, typer.Option("--lora-fa/--no-lora-fa", help="LoRA-FA: train B alone, in less memory.", **V)
    ] = None,
    lora_plus: Annotated[float | None, typer.Option(help="LoRA+: learning rate of B over A's.", **V)] = None,
    adalora: Annotated[
        int | None, typer.Option(help="AdaLoRA: mean rank at the end; training starts with --rank.", **V)
    ] = None,
    init: Annotated[str | None, typer.Option(help=f"How A and B start: {INITS}.", **V)] = None,
    invocation: Annotated[
        str | None, typer.Option(help="aLoRA: the text, or token ids with commas, from which on the adapter acts.", **V)
    ] = None,
    trainable_tokens: Annotated[
        str | None, typer.Option(help="Token ids, with commas, whose embeddings are trained.", **V)
    ] = None,
    new_tokens: Annotated[
        list[str] | None, typer.Option(help="A token to add to the vocabulary and train; may be repeated.", **V)
    ] = None,
    tied_head: Annotated[
        str | None, typer.Option(help="An adapted embedding tied to the head: refuse, both or embedding.", **V)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per optimiser step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest example in tokens.")] = None,
    on_bad_row: Annotated[str | None, typer.Option(help="error or skip.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja chat template.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    quant: Annotated[str | None, typer.Option(help=QUANT_HELP)] = None,
    stream: Annotated[
        str | None,
        typer.Option(help="Frozen blocks in host memory (host) or in their files (disk); see docs/stream.md."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key, e.g. train.pack=off.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Validate everything, train nothing.")] = False,
) -> None:
    """Train an adapter: from a YAML file, from flags, or both (flags win)."""
    flags = {key: value for key, value in locals().items() if key in FLAGS and value not in (None, [])}
    if config is not None and _train_list(config, flags, set_ or [], resume, dry_run):
        return
    resolved = _resolve(config, flags, set_ or [], resume)
    from veneer.training.loop import Trainer

    display = RunDisplay()
    trainer = Trainer(resolved, observe=display)
    if dry_run:
        _dry_run(trainer, resolved)
        return
    with display:
        result = trainer.run(resume=resume)
    if result.stopped == "interrupted":
        err.print(
            f"stopped after step {result.steps} of {result.total_steps}; go on: veneer train {result.path} --resume"
        )
        raise typer.Exit(130)
    from veneer.report.page import write_report

    page = write_report(result.path)
    Console(highlight=False).print(
        f"adapter  {result.adapter}\nreport   {page}\n"
        f"loss     {_losses(result)}\n"
        f"next     veneer eval {result.path}   ·   veneer chat {result.path} --compare",
        soft_wrap=True,
    )


def _train_list(config: Path, flags: dict[str, Any], settings: list[str], resume: bool, dry_run: bool) -> bool:
    """Train the adapters that a configuration lists (or a sweep's directory holds); False if there is only one."""
    from veneer.cli import sweep
    from veneer.config import put, read_yaml

    if config.is_dir():
        if not (resume and sweep.is_sweep(config)):
            return False
        if flags or settings or dry_run:
            raise ConfigError("--resume goes on with the sweep in a directory as it was started: leave other flags out")
        sweep.resume_sweep(config)
        return True
    values = read_yaml(config)
    if "adapters" not in values:
        return False
    for key, value in _overrides(flags, settings).items():
        put(values, key, value)
    sweep.train_list(values, resume=resume, dry_run=dry_run)
    return True


def _losses(result: Any) -> str:
    last = "–" if result.loss is None else f"{result.loss:.4f}"  # a resumed run may have had no step left
    return last if result.best_loss is None else f"{last}, held-out best {result.best_loss:.4f}"


def _overrides(flags: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """What the flags and --set give, by dotted configuration key."""
    for key in ("data", "heldout"):
        if key in flags and len(flags[key]) == 1:
            flags[key] = flags[key][0]
    for key in ("invocation", "trainable_tokens"):
        if key in flags and flags[key].replace(",", "").replace(" ", "").isdecimal():
            flags[key] = [int(part) for part in flags[key].split(",") if part.strip()]
    if "targets" in flags:
        flags["targets"] = parse_targets(flags["targets"])
    return {FLAGS[key]: value for key, value in flags.items()} | parse_settings(settings)


def _resolve(config: Path | None, flags: dict[str, Any], settings: list[str], resume: bool):
    from veneer.config import TrainConfig, read_yaml

    overrides = _overrides(flags, settings)
    run = (
        config
        if config is not None and config.is_dir()
        else Path(flags["out"])
        if resume and "out" in flags and not config
        else None
    )
    if run is not None:
        if not resume:
            raise ConfigError(f"{run} is a directory: to continue a run add --resume, else name a YAML file")
        if not (run / "config.yaml").exists():
            raise RunError(f"{run} holds no run to resume")
        values = read_yaml(run / "config.yaml") | {"out": str(run)}
        if "train.stream" in overrides:
            values.get("train", {}).pop("resident_blocks", None)  # as many as fitted where the blocks were
        return TrainConfig.from_dict(values, overrides)
    return TrainConfig.from_dict(read_yaml(config) if config else {}, overrides)


def _dry_run(trainer: Any, config: Any) -> None:
    trainer.dry_run()
    options = config.train
    print(config.to_yaml())
    total = trainer.setup.total_steps(options)
    err.print(f"{total} steps of {options.batch_size} examples; all is valid, nothing was trained")


class RunDisplay(Display):
    """Training progress: a bar with loss, tokens/s and time left in a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        super().__init__("loss {task.fields[loss]} · {task.fields[speed]} tok/s")
        self.total, self.left = 0, lambda step: 0.0

    def _note(self, record: dict[str, Any]) -> None:
        self.say(record["text"], warning=record["text"].startswith("warning"))

    def _start(self, record: dict[str, Any]) -> None:
        self.total, began, first = record["total_steps"], time.monotonic(), record["step"]
        self.left = lambda step: (time.monotonic() - began) / max(1, step - first) * (self.total - step)
        self.task = self.progress.add_task("", total=self.total, completed=first, loss="–", speed="–")

    def _train(self, record: dict[str, Any]) -> None:
        loss, speed = f"{record['loss']:.3f}", f"{record['tokens_per_second']:,.0f}"
        if err.is_terminal:
            self.progress.update(self.task, completed=record["step"], loss=loss, speed=speed)
        elif time.monotonic() - self.said > 10 or record["step"] == self.total:
            self.said = time.monotonic()
            left = self.left(record["step"])
            err.print(f"step {record['step']}/{self.total}  loss {loss}  {speed} tok/s  {left:.0f} s left")

    def _eval(self, record: dict[str, Any]) -> None:
        best = " (best so far)" if record["best"] else ""
        self.progress.console.print(f"step {record['step']}: held-out loss {record['loss']:.4f}{best}")

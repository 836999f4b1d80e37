"""veneer plan"""

from __future__ import annotations

import json
from shlex import quote
from typing import Annotated, Any

import typer
from rich.console import Console

from veneer.cli.common import err, parse_settings, parse_targets
from veneer.errors import ConfigError, PlanError

AXES = {"quant": "quant", "train.checkpointing": "dial", "train.optimizer": "optimizer", "train.stream": "stream",
        "train.embedding": "embedding"}  # fmt: skip
"""Keys that a user may fix → what the plan calls them."""
EXAMPLES = 16
"""Sequences of a step where nothing says how many: `train.batch_size`'s default."""


def command(
    model: Annotated[
        str, typer.Argument(help="A directory or config.json, a known name, a GGUF file, a hub id.", metavar="MODEL")
    ],
    vram: Annotated[str | None, typer.Option(help="Memory of the device: 8GB. Default: what is free on yours.")] = None,
    ram: Annotated[str | None, typer.Option(help="Host memory beside it: 32GB. Default: yours, if the GPU is.")] = None,
    seq: Annotated[
        int | None, typer.Option(min=16, help="Longest sequence in tokens. Default: 2048, or --data's.")
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(min=16, help="Tokens of an optimiser step. Default: 16 sequences.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", help="Take lengths from this training data.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the update.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="all-linear, attention, mlp, names with commas, or a regular expression.")
    ] = None,
    quant: Annotated[str, typer.Option(help="auto (none or nf4), or one of: none, nf4, fp4, int8, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="The base's: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu: for what to plan.")] = "auto",
    gpus: Annotated[bool, typer.Option("--gpus", help="List common cards, and what fits on each.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting to keep, e.g. train.checkpointing=recompute."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Find settings that fit a memory budget, with predicted memory and speed; nothing is loaded or downloaded."""
    from veneer.plan.fit import Wish, find
    from veneer.plan.here import machine

    adapter, fixed = _settings(set_ or [], rank, targets, quant)
    here = machine("card" if gpus else device, _size("--vram", vram), _size("--ram", ram), dtype)
    sequence, tokens = _lengths(model, data or [], seq, tokens_per_step)
    profile = here.profile(model, adapter)
    wish = Wish(sequence, tokens, fixed, compile=here.compile and fixed.pop("compile", "auto") != "off")
    console = Console(highlight=False)
    if gpus:
        _cards(profile, wish, here, console, as_json)
        return
    plan = find(profile, here.budget, here.rates, wish)
    if as_json:
        print(json.dumps(plan.as_dict() | {"machine": here.as_dict(), "notes": here.notes}, indent=2))
        return
    from veneer.report.planned import print_plan

    about = f"{profile.numbers / 1e9:.2f} B parameters, {tokens:,} tokens a step in sequences of up to {sequence:,}"
    print_plan(plan, console, f"{model}: {about}; {here.name}", here.notes)
    flags = [
        *(("-d", path) for path in data or ["DATA"]),
        ("-o", "OUT"),
        ("--vram", vram),
        ("--rank", rank),
        ("--targets", targets),
        ("--quant", quant if quant != "auto" else None),
        ("--max-length", seq),
        *(("--set", pair) for pair in set_ or []),
    ]
    given = "".join(f" {flag} {quote(str(value))}" for flag, value in flags if value is not None)
    err.print(f"run it: veneer train -m {quote(model)}{given}", style="dim", soft_wrap=True)


def _size(flag: str, value: str | None) -> int | None:
    from veneer.config import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise ConfigError(f"{flag} {value!r}: {error}") from None


def _settings(settings: list[str], rank: int | None, targets: str | None, quant: str) -> tuple[Any, dict[str, Any]]:
    """The adapter, and what the user fixed."""
    from veneer.config import TrainConfig

    flags = {"adapter.rank": rank, "adapter.target_modules": parse_targets(targets)}
    given = parse_settings(settings) | {key: value for key, value in flags.items() if value is not None}
    if quant != "auto":
        given["quant"] = quant
    known = (*AXES, "train.micro_batch_tokens", "train.keep_blocks", "train.resident_blocks", "train.compile")
    if wrong := [key for key in given if key not in known and not key.startswith("adapter.")]:
        raise ConfigError(f"--set {wrong[0]}: a plan takes adapter's keys and {', '.join(known)}")
    config = TrainConfig.from_dict({"data": "-", "out": "-"}, given)
    fixed = {AXES[key]: value for key, value in given.items() if key in AXES}
    for key in ("train.stream", "train.checkpointing"):  # which YAML may read as on or off
        if key in given:
            fixed[AXES[key]] = getattr(config.train, key.removeprefix("train."))
    if "train.micro_batch_tokens" in given:
        fixed["micro_tokens"] = config.train.micro_batch_tokens
    if "train.keep_blocks" in given:
        fixed["keep"] = config.train.keep_blocks
    if given.get("train.resident_blocks", "auto") != "auto":
        fixed["resident"] = config.train.resident_blocks
    if "train.compile" in given:
        fixed["compile"] = config.train.compile
    return config.adapter, fixed


def _lengths(model: str, data: list[str], seq: int | None, tokens: int | None) -> tuple[int, int]:
    """Longest sequence and tokens of a step, as stated or as the data have them."""
    if data:
        from veneer.base.load import load_tokenizer
        from veneer.config import TrainConfig
        from veneer.training.setup import load_data

        options = {"train": data if len(data) > 1 else data[0]} | ({"max_length": seq} if seq else {})
        config = TrainConfig(model=model, data=options, out="-")
        found = load_data(config, "train", load_tokenizer(model), lambda line: err.print(line, style="dim"))
        mean = found.counts.tokens / max(1, found.counts.examples)
        return found.counts.longest, tokens or max(found.counts.longest, round(EXAMPLES * mean))
    sequence = seq or 2048
    return sequence, max(sequence, tokens or EXAMPLES * sequence)


def _cards(profile: Any, wish: Any, here: Any, console: Console, as_json: bool) -> None:
    from dataclasses import replace

    from veneer.plan.devices import CARDS
    from veneer.plan.fit import Budget, find
    from veneer.plan.here import HOST_UNKNOWN
    from veneer.report.planned import print_cards

    rows, plain = [], replace(wish, fixed={"optimizer": "adamw"} | wish.fixed, compile=True)
    for card in CARDS:
        budget = Budget(card.usable, here.budget.host, True, None)
        try:
            rows.append((card.name, card.memory, find(profile, budget, card.rates, plain).chosen))
        except PlanError as error:
            rows.append((card.name, card.memory, str(error).split(": ", 1)[-1].split(";")[0].split(", with")[0]))
    if as_json:
        found = [{"card": n, "memory": m} | ({"error": o} if isinstance(o, str) else o.as_dict()) for n, m, o in rows]
        print(json.dumps(found, indent=2))
        return
    print_cards(rows, console, f"{profile.name}: {wish.tokens:,} tokens a step, sequences of up to {wish.sequence:,}")
    if HOST_UNKNOWN in here.notes:
        console.print(HOST_UNKNOWN, style="dim", soft_wrap=True)

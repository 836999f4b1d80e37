"""veneer init"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml

from veneer.errors import ConfigError

TASKS = {
    "demo": (
        "the bundled task: a free-text message into a strict JSON object",
        {
            "data": {"train": "bundled", "heldout": "bundled:heldout"},
            "train": {"lr": 1e-3},
            "out": "runs/demo",
        },
    ),
    "chat": (
        "your conversations, in OpenAI's or ShareGPT's form",
        {
            "data": {"train": "train.jsonl", "heldout_fraction": 0.1},
            "out": "runs/chat",
        },
    ),
    "instruct": (
        "instructions and answers, in Alpaca's form",
        {
            "data": {"train": "train.json", "heldout_fraction": 0.1},
            "out": "runs/instruct",
        },
    ),
    "text": (
        "plain text, to continue in its style",
        {
            "data": {"train": "text/", "heldout_fraction": 0.05, "max_length": 1024, "on_long": "split"},
            "out": "runs/text",
        },
    ),
}


def command(
    task: Annotated[str, typer.Argument(help="demo, chat, instruct or text.")] = "chat",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("veneer.yaml"),
    model: Annotated[str, typer.Option("--model", "-m", help="The base model.")] = "smollm2-135m-instruct",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a commented YAML configuration for a task."""
    from veneer.files import write_text

    if task not in TASKS:
        raise ConfigError(f"no task {task!r}: choose {', '.join(TASKS)}")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists: choose another --out, or replace it with --force")
    write_text(out, commented(task, model))
    print(f"wrote {out}; check it with: veneer train {out} --dry-run")


def commented(task: str, model: str) -> str:
    """A configuration for a task: what it sets, then every other key with its default, commented out."""
    from veneer.config import TrainConfig

    about, chosen = TASKS[task]
    chosen = {"model": model, **chosen}
    lines = [f"# Veneer: {about}.", "# Keys behind '#' show their defaults.", ""]
    for key, field in TrainConfig.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        lines += _comment(field.description)
        if section is None:
            lines.append(_line(key, chosen[key]) if key in chosen else "# " + _line(key, field.default))
        else:
            lines.append(f"{key}:")
            lines += _section(section, chosen.get(key, {}))
        lines.append("")
    return "\n".join(lines)


def _section(fields: dict, chosen: dict, comment: bool = True) -> list[str]:
    lines, off = [], "# " if comment else ""
    for key, field in fields.items():
        lines += ["  " + line for line in _comment(field.description)]
        if (inner := section_in(field.annotation)) is not None:
            lines += [f"  # {key}:", *(f"  # {line}" for line in _section(inner, {}, comment=False))]
            continue
        default = field.get_default(call_default_factory=True)
        lines.append("  " + _line(key, chosen[key]) if key in chosen else f"  {off}" + _line(key, default))
    return lines


def section_in(annotation: Any) -> dict | None:
    """The fields of the section that a field holds, or may hold; None if it holds a plain value."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind.model_fields for kind in kinds if hasattr(kind, "model_fields")), None)


def _comment(text: str | None) -> list[str]:
    return [f"# {' '.join(text.split())}"] if text else []


def _line(key: str, value: object) -> str:
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return f"{key}: {text.removesuffix('...' + chr(10)).strip()}"

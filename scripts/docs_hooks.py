"""MkDocs hook: the page of all commands, made from what their --help is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File


def on_files(files: Any, config: Any) -> Any:
    from typer.main import get_command

    from veneer.cli.main import app

    pages = (page(name, command) for name, command in commands("veneer", get_command(app)))
    head = "# Commands\n\nEach page of `veneer COMMAND --help`, in one place.\n\n"
    files.append(File.generated(config, "cli.md", content=head + "\n".join(pages)))
    return files


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command and, of a group, those inside it."""
    for part, one in getattr(command, "commands", {}).items():
        yield from commands(f"{name} {part}", one)
    if not hasattr(command, "commands"):
        yield name, command


def page(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    shown = " ".join(label(p) for p in arguments)
    rows = [row(p, label(p)) for p in arguments]
    rows += [row(p, "`, `".join([*p.opts, *p.secondary_opts])) for p in command.params if p not in arguments]
    usage = f"    {name} {shown} [OPTIONS]".replace("  [", " [")
    return "\n".join(
        [f"## {name}\n", (command.help or "").strip() + "\n", usage + "\n", "| | |", "|---|---|", *rows, ""]
    )


def label(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def row(parameter: Any, name: str) -> str:
    said = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    value = parameter.default
    if isinstance(value, (int, float, str)) and not isinstance(value, bool) and value != "":
        said += f" Default: {value}."
    return f"| `{name}` | {said}{' Required.' if parameter.required else ''} |"

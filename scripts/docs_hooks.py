"""MkDocs hook: the page of all commands, made from their own --help."""

from mkdocs.structure.files import File


def on_files(files, config):
    from typer.main import get_command

    from veneer.cli.main import app

    parts = ["# Commands\n\nWhat `veneer COMMAND --help` says.\n"]
    root = get_command(app)
    for name, command in root.commands.items():
        for path, one in [(name, command)] if not hasattr(command, "commands") else [
            (f"{name} {sub}", inner) for sub, inner in command.commands.items()
        ]:
            parts.append(_page(path, one))
    files.append(File.generated(config, "cli.md", content="\n".join(parts)))
    return files


def _page(name, command):
    arguments = " ".join(p.make_metavar(None) if False else (p.metavar or p.name).upper() for p in command.params if p.param_type_name == "argument")
    lines = [f"## veneer {name}\n", (command.help or "").replace("\n", " ") + "\n", f"    veneer {name} {arguments} [OPTIONS]\n"]
    lines += ["| option | |", "|---|---|"]
    for p in command.params:
        said = (getattr(p, "help", "") or "").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
        names = f"`{(p.metavar or p.name).upper()}`" if p.param_type_name == "argument" else ", ".join(f"`{o}`" for o in [*p.opts, *p.secondary_opts])
        default = p.default if isinstance(p.default, (int, float, str)) and not isinstance(p.default, bool) else None
        lines.append(f"| {names} | {said}" + (f" Default: {default}." if default not in (None, "") else "") + " |")
    return "\n".join(lines) + "\n"

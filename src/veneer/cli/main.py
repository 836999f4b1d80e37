"""The `veneer` command: every subcommand, and how errors reach the user."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from veneer.cli import (
    bench,
    chat,
    combine,
    data,
    diff,
    evaluate,
    explain,
    export,
    extract,
    generate,
    import_,
    info,
    init,
    merge,
    plan,
    resize,
    serve,
    sweep,
    train,
)
from veneer.errors import VeneerError
from veneer.version import __version__

app = typer.Typer(
    name="veneer",
    help="Low-rank adaptation (LoRA) of large models on one ordinary machine: a frozen base, a thin trained layer.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.command)
app.command("sweep")(sweep.command)
app.command("eval")(evaluate.command)
app.command("chat")(chat.command)
app.command("generate")(generate.command)
app.add_typer(data.app, name="data")
app.command("explain")(explain.command)
app.command("plan")(plan.command)
app.command("serve")(serve.command)
app.command("merge")(merge.command)
app.command("combine")(combine.command)
app.command("export")(export.command)
app.command("import")(import_.command)
app.command("bench")(bench.command)
app.command("extract")(extract.command)
app.command("resize")(resize.command)
app.command("diff")(diff.command)
app.command("init")(init.command)
app.command("info")(info.command)


# typer brings its own copy of click in newer releases and uses the package in older ones: take the class from typer.
UsageProblem = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"veneer {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@cache
def parser() -> Callable[..., Any]:
    """The commands with all their options, read from the signatures once in a process: that takes 0.1 s."""
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A user's mistake is one line and exit code 2; Ctrl-C is 130."""
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, whose wheels warn of each other
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        code = parser()(args=arguments, standalone_mode=False)
    except VeneerError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        code = 2
    except typer.Exit as error:
        code = error.exit_code
    except UsageProblem as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        code = 141
    sys.exit(code if isinstance(code, int) else 0)

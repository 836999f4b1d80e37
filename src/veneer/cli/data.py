"""veneer data"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from veneer.cli.common import err

app = typer.Typer(help="Look at training data before anything runs.", no_args_is_help=True)


@app.callback()
def root() -> None:
    pass


@app.command("inspect")
def inspect(
    source: Annotated[list[str], typer.Argument(help="Files, folders, a hub data set, or 'bundled'; or a YAML file.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Whose tokenizer and chat template.")
    ] = "smollm2-135m-instruct",
    heldout: Annotated[list[str] | None, typer.Option(help="Held-out data, to find duplicates with.")] = None,
    format: Annotated[str, typer.Option(help="auto, messages, sharegpt, alpaca, completion or text.")] = "auto",
    train_on: Annotated[str, typer.Option(help="assistant, last-assistant or all.")] = "assistant",
    max_length: Annotated[int, typer.Option(min=8, help="Longest example in tokens.")] = 2048,
    on_long: Annotated[str, typer.Option(help="truncate, drop or split.")] = "truncate",
    on_bad_row: Annotated[str, typer.Option(help="error or skip.")] = "error",
    chat_template: Annotated[Path | None, typer.Option(help="File with a Jinja chat template.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first so many examples.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Examples to print, trained tokens coloured.")] = 3,
) -> None:
    """Counts, duplicates and examples, with the tokens that will be trained in colour."""
    from veneer.base.load import load_tokenizer
    from veneer.config import DataConfig, TrainConfig
    from veneer.data.inspect import inspect_data, render_inspection
    from veneer.data.load import content_hash, read_examples
    from veneer.data.prepare import prepare

    if len(source) == 1 and Path(source[0]).suffix in (".yaml", ".yml"):
        config = TrainConfig.load(source[0])
        options, model = config.data, config.model
    else:
        options = DataConfig(
            train=source,
            heldout=heldout,
            format=format,
            train_on=train_on,
            max_length=max_length,
            on_long=on_long,
            on_bad_row=on_bad_row,
            chat_template=str(chat_template) if chat_template else None,
            limit=limit,
        )
    tokenizer = load_tokenizer(model, chat_template=options.chat_template)

    def read(sources):
        return read_examples(
            sources, format=options.format, on_bad_row=options.on_bad_row, split=options.split, limit=options.limit
        )

    reader = read(options.train)
    examples = list(reader)
    prepared = prepare(
        examples,
        tokenizer,
        content_hash=content_hash(options.train),
        cache_dir=None,
        train_on=options.train_on,
        max_length=options.max_length,
        on_long=options.on_long,
    )
    held = list(read(options.heldout)) if options.heldout else None
    found = inspect_data(examples, prepared, tokenizer, heldout=held)
    err.print(f"format: {reader.format}")
    for reason, number in reader.skip_reasons.items():
        err.print(f"warning: {number} bad rows skipped: {reason}", style="yellow", markup=False)
    render_inspection(found, Console(), show=show)

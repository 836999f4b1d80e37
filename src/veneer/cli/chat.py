"""veneer chat"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.chat_adapters import HELP as ADAPTER_HELP
from veneer.cli.chat_adapters import Adapters
from veneer.cli.common import (
    Device,
    Dtype,
    Force,
    MaxNewTokens,
    Model,
    Quant,
    Seed,
    Temperature,
    TopP,
    err,
    open_adapter,
)
from veneer.errors import ConfigError, DataError, VeneerError

HELP = (
    "commands: /compare toggles the base beside the adapter · /system TEXT · /reset · /quit · /adapters · "
    + " · ".join(list(ADAPTER_HELP)[1:])
)


def command(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A run or an adapter directory; leave out to chat with --model alone.", metavar="RUN_OR_ADAPTER"
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="PATH", help="A further adapter to switch to; may be repeated."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer with base and adapter, one after the other.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = None,
    force: Force = False,
) -> None:
    """Talk to a model in the terminal; tokens appear as they are made."""
    from veneer.base.load import load_base

    if path is None and model is None:
        raise ConfigError("give a run or adapter directory, or --model")
    if path is None:
        loaded, tokenizer = load_base(model, device=device, dtype=dtype, quant=quant)
    else:
        opened = open_adapter(path, model, device=device, dtype=dtype, quant=quant, force=force)
        loaded, tokenizer = opened.model, opened.tokenizer
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    adapters = Adapters(loaded, tokenizer, force)
    for more in adapter or []:
        adapters.add(more)
    adapted = path is not None or bool(adapter)
    Chat(loaded, tokenizer, adapters, adapted=adapted, compare=compare, system=system, options=options).run()


class Chat:
    """A conversation in the terminal. The adapter's answers make the history; the base's are shown beside them."""

    def __init__(
        self, model, tokenizer, adapters: Adapters, *, adapted: bool, compare: bool, system: str | None, options: dict
    ) -> None:
        self.model, self.tokenizer, self.adapted, self.options = model, tokenizer, adapted, options
        self.adapters = adapters
        self.compare, self.system, self.history = compare and adapted, system, []

    def run(self) -> None:
        err.print(HELP, style="dim")
        while True:
            try:
                line = input("you> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line:
                self.turn(line)

    def turn(self, line: str) -> None:
        """One line from the user: a command, or something to answer."""
        if line == "/reset":
            self.history = []
        elif line == "/compare":
            self.compare = self.adapted and not self.compare
            err.print("comparing with the base" if self.compare else "answering alone", style="dim")
        elif line.startswith("/system"):
            self.system, self.history = line.removeprefix("/system").strip() or None, []
        elif line.startswith("/"):
            try:
                said = self.adapters.run(line)
                self.adapted = self.adapted or (said is not None and line.startswith("/add"))
                err.print(said or HELP, style="dim", markup=False, soft_wrap=True)
            except VeneerError as error:
                err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        else:
            self.history.append({"role": "user", "content": line})
            try:
                if self.compare:
                    self._answer("base", base=True)
                answer = self._answer("adapter" if self.compare else "")
            except DataError as error:  # no room in the context, or the template refuses: the talk goes on
                self.history.pop()
                err.print(f"error: {error} (/reset starts anew)", style="red", markup=False, soft_wrap=True)
            else:
                self.history.append({"role": "assistant", "content": answer})

    def _answer(self, label: str, *, base: bool = False) -> str:
        from veneer.adapter.attach import get_bank
        from veneer.base.generate import stream

        messages = [{"role": "system", "content": self.system}] if self.system else []
        if label:
            print(f"{label}> ", end="")
        text = ""
        with get_bank(self.model).disabled() if base else nullcontext():
            try:
                for piece in stream(self.model, self.tokenizer, [*messages, *self.history], **self.options):
                    print(piece, end="", flush=True)
                    text += piece
            except KeyboardInterrupt:
                err.print(" (stopped)", style="dim")
        print(flush=True)
        return text

"""veneer chat"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.chat_adapters import HELP as ADAPTER_HELP
from veneer.cli.chat_adapters import Adapters, name_for
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

HELP = ADAPTER_HELP | {
    "/compare": "answer with the base too, on and off",
    "/system TEXT": "another system message",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "end",
}
HINT = f"commands: {' · '.join(command.split()[0] for command in HELP)}"


def command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Runs or adapter directories, of which the first acts; leave out to chat with --model alone.",
            metavar="RUN_OR_ADAPTER…",
        ),
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
    """Talk to a model in the terminal; tokens appear as they are made. /help lists what changes the adapters."""
    from veneer.base.load import load_base

    first, *more = paths or [None]
    if first is None and model is None:
        raise ConfigError("give a run or adapter directory, or --model")
    if first is None:
        loaded, tokenizer = load_base(model, device=device, dtype=dtype, quant=quant)
    else:
        options = {"device": device, "dtype": dtype, "quant": quant, "force": force}
        opened = open_adapter(first, model, name=name_for(first), **options)
        loaded, tokenizer = opened.model, opened.tokenizer
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    adapters = Adapters(loaded, tokenizer, force)
    for path in more:
        adapters.add(path)
    Chat(loaded, tokenizer, adapters, compare=compare, system=system, options=options).run()


class Chat:
    """A conversation in the terminal. The adapter's answers make the history; the base's are shown beside them."""

    def __init__(
        self, model: Any, tokenizer: Any, adapters: Adapters, *, compare: bool, system: str | None, options: dict
    ) -> None:
        self.model, self.tokenizer, self.adapters, self.options = model, tokenizer, adapters, options
        self.compare, self.system, self.history = compare and adapters.bank is not None, system, []

    def run(self) -> None:
        err.print(HINT, style="dim")
        while True:
            try:
                line = input("you> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line:
                try:
                    self.turn(line)
                except VeneerError as error:  # the talk goes on
                    err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)

    def turn(self, line: str) -> None:
        """One line from the user: a command, or something to answer."""
        if line == "/reset":
            self.history = []
        elif line == "/help":
            err.print("\n".join(f"{command:20} {what}" for command, what in HELP.items()), style="dim", markup=False)
        elif line == "/compare":
            if self.adapters.bank is None:
                raise ConfigError("there is no adapter to compare with the base: /add PATH [NAME] loads one")
            self.compare = not self.compare
            err.print("comparing with the base" if self.compare else "answering alone", style="dim")
        elif line.split()[0] == "/system":
            self.system, self.history = line.removeprefix("/system").strip() or None, []
        elif line.startswith("/"):
            said = self.adapters.run(line)
            err.print(said or f"no such command; {HINT}", style="dim", markup=False, soft_wrap=True)
        else:
            self.history.append({"role": "user", "content": line})
            try:
                if self.compare:
                    self._answer("base", base=True)
                answer = self._answer("adapter" if self.compare else "")
            except VeneerError as error:
                self.history.pop()
                if isinstance(error, DataError):  # no room in the context, or the template refuses
                    raise DataError(f"{error} (/reset starts anew)") from None
                raise
            self.history.append({"role": "assistant", "content": answer})

    def _answer(self, label: str, *, base: bool = False) -> str:
        from veneer.base.generate import stream

        messages = [{"role": "system", "content": self.system}] if self.system else []
        if label:
            print(f"{label}> ", end="")
        text = ""
        with self.adapters.bank.disabled() if base else nullcontext():
            try:
                for piece in stream(self.model, self.tokenizer, [*messages, *self.history], **self.options):
                    print(piece, end="", flush=True)
                    text += piece
            except KeyboardInterrupt:
                err.print(" (stopped)", style="dim")
        print(flush=True)
        return text

"""veneer chat"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

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
    locate,
    open_adapter,
)
from veneer.errors import AdapterStateError, ConfigError, DataError, VeneerError

HELP = """\
/use NAME            this adapter alone
/stack A=0.7 B=-0.3  several at once, weighted (A alone: weight 1)
/weight NAME W       one adapter's weight in the stack; 0 takes it out
/off                 the base alone
/add PATH [NAME]     load a further run or adapter directory
/adapters            which there are, and which act
/compare             answer with the base too, on and off
/system TEXT         another system message
/reset               forget the conversation
/quit                end"""
HINT = "commands: /use · /stack · /weight · /off · /add · /adapters · /compare · /system · /reset · /quit · /help says more"


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
    """Talk to a model in the terminal; tokens appear as they are made. Adapters are changed while it runs (/help)."""
    from veneer.base.load import load_base

    if not paths and model is None:
        raise ConfigError("give a run or adapter directory, or --model")
    if not paths:
        loaded, tokenizer = load_base(model, device=device, dtype=dtype, quant=quant)
    else:
        name = free_name(paths[0], ())
        opened = open_adapter(paths[0], model, name=name, device=device, dtype=dtype, quant=quant, force=force)
        loaded, tokenizer = opened.model, opened.tokenizer
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    chat = Chat(loaded, tokenizer, system=system, options=options, force=force)
    for path in (paths or [])[1:]:
        chat.add(str(path))
    chat.compare = compare and chat.bank is not None
    chat.run()


def free_name(path: Path, taken: Any) -> str:
    """A name for an adapter, after its run's or its own directory; numbered if it is taken."""
    adapter, run = locate(path)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", (run or adapter).resolve().name).strip("-") or "adapter"
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


class Chat:
    """A conversation in the terminal. The adapters' answers make the history; the base's are shown beside them."""

    def __init__(self, model: Any, tokenizer: Any, *, system: str | None, options: dict, force: bool = False) -> None:
        self.model, self.tokenizer, self.options, self.force = model, tokenizer, options, force
        self.compare, self.system, self.history = False, system, []
        self.commands: dict[str, Callable[..., None]] = {
            "use": self.use, "stack": self.stack, "weight": self.weight, "off": self.off, "add": self.add,
            "adapters": self.adapters, "compare": self.toggle, "reset": self.reset, "help": lambda: say(HELP),
        }  # fmt: skip

    @property
    def bank(self) -> Any:
        """The model's adapters; None while it has none."""
        from veneer.adapter.attach import BANK

        return self.model.__dict__.get(BANK)

    def run(self) -> None:
        say(HINT)
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
        if line.startswith("/"):
            self.obey(line[1:])
            return
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

    def obey(self, line: str) -> None:
        """A command without its slash."""
        name, _, rest = line.partition(" ")
        if name == "system":
            self.system, self.history = rest.strip() or None, []
            return
        if name not in self.commands:
            raise ConfigError(f"no command /{name}; {HINT}")
        try:
            arguments = shlex.split(rest)
        except ValueError as error:
            raise ConfigError(f"/{name}: {error}".lower()) from None
        usage = next((row[:21].strip() for row in HELP.splitlines() if row.startswith(f"/{name} ")), f"/{name}")
        if not _fits(name, len(arguments)):
            raise ConfigError(f"write {usage}")
        self.commands[name](*arguments)

    def use(self, name: str) -> None:
        self._activate({name: 1.0})

    def stack(self, *parts: str) -> None:
        pairs = [part.partition("=") for part in parts]
        names = [name for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise ConfigError("an adapter is named twice")
        self._activate({name: number(value) if equals else 1.0 for name, equals, value in pairs})

    def weight(self, name: str, value: str) -> None:
        stack = (self.bank.active if self.bank else {}) | {name: number(value)}
        self._known(stack)
        self._activate({n: w for n, w in stack.items() if w != 0})

    def off(self) -> None:
        self._activate({})

    def add(self, path: str, name: str | None = None) -> None:
        """Load a further adapter; who acts stays as it was."""
        from veneer.formats.peft import load_adapter

        acting, names = (self.bank.active, self.bank.names) if self.bank else ({}, [])
        folder = Path(path).expanduser()
        name = name or free_name(folder, names)
        adapter = locate(folder)[0]
        load_adapter(
            self.model, adapter, name=name, force=self.force, trainable=False, tokenizer=self.tokenizer
        ).activate(acting)
        self.model.eval()
        say(f"added {name}: /use {name}")

    def adapters(self) -> None:
        if not self.bank:
            say("no adapters: /add PATH loads one")
            return
        active = self.bank.active
        for name in self.bank.names:
            ranks = sorted({self.bank.layers[path].rank[name] for path in self.bank.entries[name].targets})
            rank = (
                f"rank {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}" if ranks else "no factors"
            )
            say(f"{name}  {rank}  {f'acts, weight {active[name]:g}' if name in active else 'off'}")

    def toggle(self) -> None:
        self.compare = self.bank is not None and not self.compare
        say("comparing with the base" if self.compare else "answering alone")

    def reset(self) -> None:
        self.history = []

    def _known(self, names: Any) -> None:
        if not self.bank:
            raise AdapterStateError("the model has no adapters: /add PATH loads one")
        for name in names:
            self.bank.check(name)

    def _activate(self, stack: dict[str, float]) -> None:
        if stack or self.bank:
            self._known(stack)
            self.bank.activate(stack)
        say(" + ".join(name if w == 1 else f"{w:g}·{name}" for name, w in stack.items()) or "the base alone")

    def _answer(self, label: str, *, base: bool = False) -> str:
        from veneer.base.generate import stream

        messages = [{"role": "system", "content": self.system}] if self.system else []
        if label:
            print(f"{label}> ", end="")
        text = ""
        with self.bank.disabled() if base else nullcontext():
            try:
                for piece in stream(self.model, self.tokenizer, [*messages, *self.history], **self.options):
                    print(piece, end="", flush=True)
                    text += piece
            except KeyboardInterrupt:
                err.print(" (stopped)", style="dim")
        print(flush=True)
        return text


def say(text: str) -> None:
    """A remark about the talk, beside the answers."""
    err.print(text, style="dim", markup=False, soft_wrap=True)


def number(text: str) -> float:
    """A weight as typed."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"a weight is a number such as 0.7 or -0.3, not {text!r}")
    return value


def _fits(name: str, count: int) -> bool:
    """Whether a command takes so many arguments."""
    return {"use": count == 1, "stack": count >= 1, "weight": count == 2, "add": count in (1, 2)}.get(name, count == 0)

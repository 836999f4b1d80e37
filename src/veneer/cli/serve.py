"""veneer serve"""

from __future__ import annotations

import os
import shlex
import signal
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.common import QUANT_HELP, Device, Dtype, err
from veneer.errors import ConfigError

Quant = Annotated[str | None, typer.Option(help=QUANT_HELP)]


def command(
    base: Annotated[str, typer.Argument(help="Base model: a known name, a directory, a GGUF file or a hub id.")],
    adapters: Annotated[
        list[Path] | None,
        typer.Option("--adapters", help="Serve this adapter or run, or every one in this folder. Repeatable."),
    ] = None,
    allow: Annotated[
        list[Path] | None,
        typer.Option("--allow", help="A folder that adapters may be loaded from while serving. Repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VENEER_API_KEY", help="Key that requests must bring; better given in the environment."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A further name that requests may call the server by. Repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What the base is called. Default: as given.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 16,
    context: Annotated[int, typer.Option(min=16, help="Longest prompt and answer together, in tokens.")] = 2048,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 64,
    max_rank: Annotated[int, typer.Option(min=1, help="Largest rank of an adapter.")] = 64,
    device_adapters: Annotated[
        int | None, typer.Option(min=1, help="Adapters kept in the device's memory. Default: as many as a batch needs.")
    ] = None,
    host_adapters: Annotated[int, typer.Option(min=1, help="Adapters kept in the host's memory.")] = 256,
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds that running answers get when the server is stopped.")
    ] = 30,
    engine: Annotated[str, typer.Option(help="veneer, or vllm to hand the same adapters over to it.")] = "veneer",
    only_print: Annotated[bool, typer.Option("--print", help="With --engine vllm: print the command.")] = False,
    export_to: Annotated[
        Path | None, typer.Option(help="With --engine vllm: where the adapters go in its form. Default: the cache.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = None,
) -> None:
    """Serve a base and its adapters behind OpenAI's API, with a web page at /. Ctrl-C or SIGTERM finishes and stops."""
    if engine not in ("veneer", "vllm"):
        raise ConfigError(f"--engine {engine!r}: use veneer or vllm")
    if engine == "veneer" and (only_print or export_to):
        raise ConfigError("--print and --export-to go with --engine vllm")
    from veneer.serve.folders import name_adapters
    from veneer.serve.names import check_base

    served = check_base(name or (Path(base).expanduser().resolve().name if os.path.exists(base) else base))
    folders = [folder.expanduser().resolve() for folder in adapters or []]
    named = name_adapters(folders)
    for taken in {served, "base"} & named.keys():
        raise ConfigError(
            f"{named[taken]} has the base's name, {taken!r}: rename the folder, or give the base a --name"
        )
    if engine == "vllm":
        if quant or allow or allow_host:
            raise ConfigError("--quant, --allow and --allow-host are for Veneer's own engine: leave them out")
        options = {"name": served, "host": host, "port": port, "context": context, "dtype": dtype, "api_key": api_key}
        return _vllm(base, named, export_to, options, only_print)
    allowed = folders + [folder.expanduser().resolve() for folder in allow or []]
    for folder in allowed:
        if not folder.is_dir():
            raise ConfigError(f"--allow {folder}: no such directory")
    with _bind(host, port) as bound:
        signal.signal(signal.SIGTERM, _leave)  # while the model loads; the server has a handler of its own
        options = {"device": device, "dtype": dtype, "quant": quant}
        sizes = {"slots": slots, "context": context, "queue": queue}
        tiers = {"max_rank": max_rank, "device_slots": device_adapters, "host_slots": host_adapters}
        from veneer.serve.guard import hosts_for
        from veneer.serve.server import run

        hosts = hosts_for(host, allow_host or ())
        running, app = _build(base, served, named, allowed, options, sizes, tiers, api_key, hosts)
        address, number = bound.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        bound.listen(2048)  # from the moment that the address is told: who comes early waits
        err.print(f"{served} and {len(named)} adapters at http://{shown}:{number} (Ctrl-C stops)", markup=False)
        if hosts_for(host) is None and not api_key:
            err.print("warning: others can reach this server and there is no --api-key", style="yellow")
        run(app, running, bound, drain)


def _build(
    base: str,
    served: str,
    named: dict[str, Path],
    allowed: list[Path],
    options: dict[str, Any],
    sizes: dict[str, int],
    tiers: dict[str, Any],
    api_key: str | None,
    hosts: list[str] | None,
) -> tuple[Any, Any]:
    """(engine, application) with the adapters loaded."""
    from veneer.base.load import load_base
    from veneer.serve.app import create_app
    from veneer.serve.engine import Engine
    from veneer.serve.registry import Registry

    model, tokenizer = load_base(base, **options)
    registry = Registry(model, allowed=allowed, **tiers)
    for name, path in named.items():
        registry.load(name, path)
    engine = Engine(model, tokenizer, registry, **sizes)
    app = create_app(
        engine,
        registry,
        tokenizer,
        model,
        base=served,
        context=engine.context,
        allowed=allowed,
        api_key=api_key,
        hosts=hosts,
    )
    return engine, app


def _leave(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # Python's end gives signals back to the system: another one would kill it
    raise typer.Exit(0)


def _bind(host: str, port: int) -> socket.socket:
    """The socket to listen on, before anything is loaded: a taken port is said at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot bind to {host} port {port}: {error.strerror or error}; choose another --port"
        ) from None
    return bound


def _vllm(base: str, named: dict[str, Path], out: Path | None, options: dict[str, Any], only_print: bool) -> None:
    """Export the adapters for vLLM and become it, or print how to."""
    from veneer.base.paths import cache_dir
    from veneer.serve.vllm import hand_over, installed

    if not only_print and not installed():
        raise ConfigError("vllm is not installed here: pip install vllm, or --print shows the command for elsewhere")
    found = hand_over(base, named, out or cache_dir() / "vllm", **options)
    for note in found.notes:
        err.print(f"note: {note}", style="yellow", markup=False)
    if not only_print:
        os.execvpe(found.command[0], found.command, os.environ | found.environment)
    print(shlex.join(found.command))
    for key in found.environment:
        err.print(f"set {key} to the key", markup=False)

"""veneer explain"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from veneer.cli.common import base_of, locate, parse_settings, parse_targets
from veneer.errors import AdapterFormatError, BaseModelError, ConfigError, WrongBaseError


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A model (a directory or config.json, a known name, a GGUF file, a hub id), or a run or an adapter.",
            metavar="MODEL",
        ),
    ],
    rank: Annotated[int | None, typer.Option(help="Rank of the update.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scaling numerator: s = alpha / rank.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="all-linear, attention, mlp, a comma-separated list, or a regular expression.")
    ] = None,
    settings: Annotated[
        list[str],
        typer.Option("--set", help="Any setting of the adapter: --set adapter.dora=true.", metavar="KEY=VALUE"),
    ] = [],  # noqa: B006 typer copies it
    dtype: Annotated[
        str, typer.Option(help="The base's: float32, bfloat16, float16; auto: its configuration's.")
    ] = "auto",
    base: Annotated[
        str | None,
        typer.Option(help="Of an adapter: weights to compare it with. Default: its own base, if it is here."),
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Of an adapter: also write a page with plots, FILE.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """What LoRA is on a model, in numbers, from its configuration alone; or what training changed, of an adapter or run."""
    chosen = parse_settings(settings) | {
        f"adapter.{key}": value
        for key, value in (("rank", rank), ("alpha", alpha), ("target_modules", parse_targets(targets)))
        if value is not None
    }
    path = Path(model).expanduser()
    if (path / "adapter_config.json").exists() or (path / "config.yaml").exists():
        if chosen or dtype != "auto":
            raise ConfigError(
                f"{model} is an adapter or a run, which has its rank, alpha, targets and dtype: leave them out"
            )
        found = _spectrum(locate(path)[0], base)
        if page:
            from veneer.report.spectra import write_page

            write_page(found, page)
    elif base or page:
        raise ConfigError(f"{'--base' if base else '--page'} is for an adapter or a run, and {model} is neither")
    else:
        found = _explanation(model, chosen, dtype)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print(found)
        if page:
            print(f"\nwrote {page}")


def _explanation(model: str, chosen: dict[str, Any], dtype: str) -> Any:
    from veneer.config import AdapterConfig, put
    from veneer.plan.explain import explain

    values: dict[str, Any] = {}
    for key, value in chosen.items():
        section, _, rest = key.partition(".")
        if section != "adapter" or not rest:
            raise ConfigError(f"--set {key}: explain takes the settings of the adapter, such as adapter.dora=true")
        put(values, rest, value)
    return explain(model, AdapterConfig(**values), dtype=dtype)


def _spectrum(adapter: Path, base: str | None) -> Any:
    from veneer.plan.spectrum import analyse

    if base is not None:
        return analyse(adapter, base)
    try:
        return analyse(adapter, base_of(adapter))
    except (AdapterFormatError, BaseModelError, WrongBaseError):  # no base named, or not here, or under other names:
        return analyse(adapter)  # which says so; what is damaged is so again


def _print(found: Any) -> None:
    from veneer.plan.explain import Explanation
    from veneer.report.explained import print_explanation, print_spectrum

    console = Console(highlight=False)
    (print_explanation if isinstance(found, Explanation) else print_spectrum)(found, console)

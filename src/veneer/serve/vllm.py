"""Hand the same adapters and the same API over to vLLM: its command line, and the adapters in the form it serves right."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from veneer.base.load import locate
from veneer.errors import ConfigError
from veneer.files import read_object
from veneer.formats.exchange import export_adapter
from veneer.serve.names import check_name

MOST_IN_A_BATCH = 16
"""vLLM keeps --max-loras adapters on the device for one batch, each padded to the largest rank; the rest swap in."""
UNDERSTOOD = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "auto": "auto"}


@dataclass(frozen=True)
class Handover:
    """How to start vLLM. `environment` is added to the caller's; it holds the key, which a command line would show."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def hand_over(
    base: str,
    adapters: dict[str, Path],
    out: Path,
    *,
    name: str,
    host: str,
    port: int,
    context: int | None = None,
    dtype: str = "auto",
    api_key: str | None = None,
) -> Handover:
    """Write `adapters` for vLLM into `out` and build the command line that serves them.

    An adapter that `out` has from an earlier call, unchanged, is not written again. Raises `AdapterFormatError` for an
    adapter that vLLM does not serve, `ConfigError`, `BaseModelError`.
    """
    source = locate(base)
    if "gguf_file" in source.options:
        raise ConfigError(f"{base}: vLLM adapts no GGUF model: give the safetensors model that it was made from")
    modules, ranks, notes = [], [], []
    for adapter, path in adapters.items():
        place = out / f"{check_name(adapter)}-{_content(path)}"
        if not (place / "adapter_config.json").exists():
            done = export_adapter(path, place, "peft", base, engine="vllm", verify=False)
            notes += [f"{adapter}: {note}" for note in done.notes if "max-lora-rank" not in note]
        ranks.append(read_object(place / "adapter_config.json")["r"])
        modules.append(_module(adapter, place.resolve(), name))
    command = ["vllm", "serve", source.where, "--served-model-name", name, "--host", host, "--port", str(port)]
    command += ["--dtype", UNDERSTOOD[dtype]] if dtype != "auto" else []
    command += ["--max-model-len", str(context)] if context else []
    if modules:
        together = str(min(len(modules), MOST_IN_A_BATCH))
        command += ["--enable-lora", "--max-lora-rank", str(max(ranks)), "--max-loras", together]
        command += ["--max-cpu-loras", str(len(modules)), "--lora-modules", *modules]
    return Handover(command, {"VLLM_API_KEY": api_key} if api_key else {}, notes)


def _module(name: str, path: Path, base: str) -> str:
    """One value of --lora-modules: name=path, or JSON where a comma or an equals sign would be misread."""
    if "=" in str(path) or "," in str(path):
        return json.dumps({"name": name, "path": str(path), "base_model_name": base})
    return f"{name}={path}"


def _content(adapter: Path) -> str:
    """A hash over the adapter's files, so that a changed adapter is exported anew."""
    digest = hashlib.sha256()
    for file in sorted(adapter.glob("adapter_*")):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()[:12]


def installed() -> bool:
    """Whether there is a `vllm` command to hand over to."""
    return shutil.which("vllm") is not None

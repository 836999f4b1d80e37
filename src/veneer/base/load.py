"""Load a frozen base model and its tokenizer: from Veneer's catalogue, a directory, a GGUF file or a hub."""

from __future__ import annotations

import difflib
import os
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from veneer.base import quant as quantisation
from veneer.base.catalog import CATALOG, fetch
from veneer.base.quiet import quiet_transformers
from veneer.errors import BaseModelError, ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
OTHER_TASKS = ("Classification", "ForQuestionAnswering", "ForMaskedLM", "T5ForConditionalGeneration")
"""Endings of architectures that are no causal language models; AutoModelForCausalLM loads some of them all the same."""
HUB_SECONDS = 4.0
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class BaseInfo:
    """Where a base came from: the name that the user gave, and the directory or hub id it was read from.

    `quant` is how its linears are quantised: what `load_base` was asked for, or the method of a base stored so.
    """

    name_or_path: str
    source: str
    revision: str | None = None
    quant: str | None = None


@dataclass(frozen=True)
class _Source:
    """What to hand to from_pretrained."""

    where: str
    options: dict[str, Any]


def load_base(
    name_or_path: str | Path,
    *,
    dtype: Any = "auto",
    device: str = "auto",
    chat_template: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quant: str | None = None,
) -> tuple[Any, Any]:
    """A frozen causal language model in eval mode, and its tokenizer.

    `name_or_path` is a name of the catalogue, a directory, a GGUF file or a hub id. dtype "auto" is float32 on a CPU,
    bfloat16 on a GPU that has it, else float16. `quant` quantises the linears but the output head: nf4, fp4, int8
    (bitsandbytes), int8-torchao, int4-torchao, hqq; arithmetic and everything else stay in dtype. A base that is stored
    quantised (GPTQ, AWQ, bitsandbytes, …) takes no `quant`. Raises `BaseModelError` (not found, damaged, a library is
    missing, hub out of reach: within 10 seconds) and `ConfigError` (dtype, device, quant, template file).
    """
    import torch

    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    source = locate(str(name_or_path), revision)
    tokenizer = _tokenizer(source, str(name_or_path), chat_template, trust_remote_code)
    quant = quantisation.check_quant(quant, place, kind)
    stored = quantisation.stored_method(source.where)
    if stored:
        if quant:
            raise ConfigError(f"{name_or_path} is stored quantised already ({stored}): leave quant out")
        if stored in quantisation.NEEDED_BY:
            quantisation.need_extra(quantisation.NEEDED_BY[stored], f"{name_or_path} is quantised with {stored}, which")
    options = source.options | {"trust_remote_code": trust_remote_code, "dtype": kind}
    with quiet_transformers(), one_line(str(name_or_path), "model"):
        if quant == "hqq" or quant and "gguf_file" in options:  # transformers quantises neither while it loads
            model = quantisation.quantise(_read(source.where, options, str(name_or_path)), quant, kind, place)
        elif quant or stored:
            more = {"quantization_config": quantisation.transformers_config(quant, kind)} if quant else {}
            model = _read(source.where, options | more | {"device_map": {"": place}}, str(name_or_path))
        else:
            model = _read(source.where, options, str(name_or_path))
    if not getattr(model, "hf_device_map", None):
        model.to(torch.device(place))
    if quant:
        quantisation.unmap(model)
    quantisation.steady(model)
    model.requires_grad_(False)
    model.eval()
    model.veneer_base = BaseInfo(str(name_or_path), source.where, revision, quant or stored)
    return model, tokenizer


def _read(where: str, options: dict[str, Any], name: str) -> Any:
    """from_pretrained, with every weight accounted for."""
    from transformers import AutoModelForCausalLM

    _check_task(where, options, name)
    model, notes = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
    if notes.get("missing_keys"):
        missing = sorted(notes["missing_keys"])
        raise BaseModelError(f"{name}: {len(missing)} weights are missing, first {missing[0]}")
    if "gguf_file" in options:
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def _check_task(where: str, options: dict[str, Any], name: str) -> None:
    """`BaseModelError` for a checkpoint of another task, of which AutoModelForCausalLM might load the body alone."""
    from transformers import AutoConfig

    if "gguf_file" in options:
        return
    known = {key: options[key] for key in ("revision", "trust_remote_code", "local_files_only") if key in options}
    made = (getattr(AutoConfig.from_pretrained(where, **known), "architectures", None) or [""])[0]
    if made.endswith(OTHER_TASKS):
        raise BaseModelError(
            f"{name} is a {made}, and Veneer's commands are for causal language models: load it with transformers and "
            f"use veneer.attach from Python"
        )


def load_tokenizer(
    name_or_path: str | Path, *, chat_template: str | Path | None = None, revision: str | None = None
) -> Any:
    """The tokenizer of a base alone; see `load_base`."""
    return _tokenizer(locate(str(name_or_path), revision), str(name_or_path), chat_template, False)


def pick_device(device: Any) -> str:
    """Resolve "auto", and a torch.device; `ConfigError` for a device that is not there."""
    import torch

    device = str(device)
    if torch.cuda.is_available():
        growing_segments()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"device {device!r}: use auto, cpu, cuda, cuda:N or mps") from None
    if kind not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device {device!r}: use auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: this machine or this build of torch has no CUDA; use device: cpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r}: this machine has {torch.cuda.device_count()} of them, from cuda:0 up")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {device!r}: this machine or this build of torch has no MPS; use device: cpu")
    return device


def growing_segments() -> None:
    """Let the GPU allocator's segments grow, unless the user has set it up: tensors that come and go in many sizes
    (offloading, rows of all lengths) would else leave gaps of half as much again. Heeded until the first allocation."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def pick_dtype(dtype: Any, device: str) -> Any:
    """Resolve "auto" and names to a torch.dtype."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: use {', '.join(DTYPES)}")
    if dtype != "auto":
        return getattr(torch, dtype)
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float16


def locate(name: str, revision: str | None = None) -> _Source:
    """Find what a name means, in this order: catalogue, directory, GGUF file, hub id."""
    if name in CATALOG:
        return _Source(
            str(fetch(name, lambda text: print(text, file=sys.stderr, flush=True))), {"local_files_only": True}
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise BaseModelError(
                f"{name}: a model is a directory or a .gguf file, not a single {path.suffix or 'file'}"
            )
        return _Source(str(path.parent), {"gguf_file": path.name, "local_files_only": True})
    if name.startswith((".", "/", "~")) or path.suffix == ".gguf" or not HUB_ID.fullmatch(name):
        raise BaseModelError(f"{name}: no such directory or file{_near(path)}")
    near = difflib.get_close_matches(name, CATALOG, n=1, cutoff=0.7)
    if "/" not in name and near:
        raise BaseModelError(f"no model {name!r}; did you mean {near[0]!r}?")
    return _hub(name, revision)


def _directory(path: Path) -> _Source:
    if (path / "config.json").exists():
        return _Source(str(path), {"local_files_only": True})
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _Source(str(path), {"gguf_file": ggufs[0].name, "local_files_only": True})
    if ggufs:
        raise BaseModelError(f"{path} holds {len(ggufs)} GGUF files: name one, such as {ggufs[0]}")
    if (path / "adapter_config.json").exists():
        raise BaseModelError(f"{path} is an adapter, not a base model: give its base as --model")
    raise BaseModelError(f"{path} is no model: it has neither config.json nor a .gguf file{_near(path)}")


def _near(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        names = []
    near = [n for n in difflib.get_close_matches(path.name, names, n=3) if n != path.name]
    return f"; near misses: {', '.join(near)}" if near else ""


def _hub(name: str, revision: str | None) -> _Source:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    options = {"revision": revision} if revision else {}
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    if offline or not hub_reachable():
        if isinstance(cached, str):
            return _Source(name, options | {"local_files_only": True})
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise BaseModelError(
            f"{name} is no local directory and not in the hub's cache, and {reason}: download it where there is a "
            f"network and pass its directory, or use {next(iter(CATALOG))}"
        )
    return _Source(name, options)


def hub_reachable(seconds: float = HUB_SECONDS) -> bool:
    """Whether the hub answers a connection within `seconds`; name look-ups that hang are cut off too."""
    from huggingface_hub.constants import ENDPOINT

    proxies = [os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")]
    address = urlsplit(next((p for p in proxies if p), ENDPOINT))
    port = address.port or (443 if address.scheme == "https" else 80)

    def connect() -> bool:
        try:
            socket.create_connection((address.hostname, port), timeout=seconds).close()
            return True
        except OSError:
            return False

    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(connect).result(timeout=seconds)
    except FutureTimeout:
        return False
    finally:
        pool.shutdown(wait=False)


def _tokenizer(source: _Source, name: str, chat_template: str | Path | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    with quiet_transformers(), one_line(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.where, trust_remote_code=trust_remote_code, **source.options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"chat template {chat_template}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"chat template {chat_template}: not a text file in UTF-8") from None
    return tokenizer


def _without_tokenizer(folder: Path) -> bool:
    """Whether a folder is none of a tokenizer's, by the names of its files."""
    parts = ("token", "vocab", "merges", "spiece", "sentencepiece", "tekken")
    return folder.is_dir() and not any(part in file.name for file in folder.iterdir() for part in parts)


class one_line:
    """Turn whatever loading raises into one line that names the model and the likely cause."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if error is None or not isinstance(error, Exception) or isinstance(error, BaseModelError):
            return False
        text = " ".join(str(error).split())
        if type(error).__name__ == "SafetensorError":
            text = f"a weights file is damaged or cut short ({text}): download it again"
        elif self.what == "tokenizer" and _without_tokenizer(Path(self.name).expanduser()):
            text = (
                "the folder has no tokenizer's files: copy tokenizer.json and tokenizer_config.json into it from the "
                "model that it was made from"
            )
        raise BaseModelError(f"{self.name}: cannot load the {self.what}: {text[:300]}") from error

"""A model's modules and shapes from its configuration alone: on the meta device, without a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.base.catalog import CATALOG, fetched
from veneer.base.load import DTYPES, locate, one_line
from veneer.base.quiet import quiet_transformers
from veneer.errors import BaseModelError, ConfigError, VeneerError


def skeleton(name_or_path: str | Path, *, dtype: str = "auto", revision: str | None = None) -> Any:
    """The transformers model that a configuration describes, on the meta device.

    `name_or_path` is a directory (config.json is enough), a config.json, a GGUF file, a name of the catalogue (nothing is
    fetched) or a hub id (of which at most config.json is). The class is the one that the configuration names in
    `architectures`, of any task; without one, the causal language model of the type, or its bare body. dtype "auto" is
    the configuration's own, or float32. Raises `BaseModelError` (not found, broken, an unknown type, remote code) and
    `ConfigError` (dtype).
    """
    import torch

    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: use {', '.join(DTYPES)}")
    name = str(name_or_path)
    with quiet_transformers(), one_line(name, "configuration"):
        config = read_config(name, revision)
        kind = getattr(torch, dtype) if dtype != "auto" else _own_dtype(config)
    with quiet_transformers(), one_line(name, "configuration"), torch.device("meta"):
        return _model_class(config)._from_config(config, dtype=kind).eval()


def read_config(name: str, revision: str | None = None) -> Any:
    """The transformers configuration of a model; see `skeleton`."""
    from transformers import AutoConfig, PretrainedConfig

    if name in CATALOG and fetched(name) is None:
        values = dict(CATALOG[name].config)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    path = Path(name).expanduser()
    source = locate(str(path.parent) if path.name == "config.json" and path.is_file() else name, revision)
    try:
        if "gguf_file" not in source.options:
            _check_kind(name, PretrainedConfig.get_config_dict(source.where, **source.options)[0])
        return AutoConfig.from_pretrained(source.where, trust_remote_code=False, **source.options)
    except (OSError, ValueError) as error:
        if isinstance(error, VeneerError):
            raise
        raise BaseModelError(
            f"{name}: its configuration cannot be read: {str(error).strip().splitlines()[0]}"
        ) from None


def _check_kind(name: str, values: dict[str, Any]) -> None:
    """Whether transformers has the architecture. Raises `BaseModelError`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = values.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if values.get("auto_map"):
        raise BaseModelError(
            f"{name} brings Python code of its own (auto_map), which Veneer does not run: only architectures "
            f"that transformers has can be explained"
        )
    what = f"model_type {kind!r} is none that this transformers knows" if kind else "it has no model_type"
    raise BaseModelError(f"{name}: cannot tell the architecture from its configuration: {what}")


def stored_quantisation(config: Any) -> str | None:
    """The method by which a configuration says that its checkpoint is quantised."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method)) if method else None


def _own_dtype(config: Any) -> Any:
    import torch

    kind = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, kind) if isinstance(kind, str) else kind


def _model_class(config: Any) -> Any:
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if getattr(found, "config_class", None) is not None:
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise BaseModelError(f"transformers has no model for a {type(config).__name__}")


__all__ = ["read_config", "skeleton", "stored_quantisation"]

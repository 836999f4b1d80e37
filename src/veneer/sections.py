"""The base of the configuration classes, and how their mistakes are said in one line."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from veneer.errors import ConfigError

ELSEWHERE = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "init",
    "layers_to_transform": "layers",
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "lr_scheduler_type": "schedule",
    "gradient_checkpointing": "checkpointing",
    "base_model": "model",
    "model_name_or_path": "model",
    "output_dir": "out",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
}
"""What other tools call a key → its name here."""


class Section(BaseModel):
    """Base of the configuration classes: unknown keys are errors, and errors are `ConfigError`."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """A section whose keys are all commented out reads as null: it has its defaults."""
        if not isinstance(values, dict):
            return values
        empty = {k for k, v in values.items() if v is None and k in cls.model_fields}
        empty = {
            k for k in empty if isinstance(kind := cls.model_fields[k].annotation, type) and issubclass(kind, Section)
        }
        return {k: v for k, v in values.items() if k not in empty or cls.model_fields[k].is_required()}

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first problem of a pydantic error, with the nearest known key for an unknown one."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    nested = first.get("ctx", {}).get("error")
    if isinstance(nested, ConfigError):  # a section inside this one has explained itself: add where it stands
        return str(nested).replace("configuration key '", "configuration key '" + "".join(f"{p}." for p in path), 1)
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        same = [ELSEWHERE[path[-1]]] if ELSEWHERE.get(path[-1]) in known else []
        near = same or difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown configuration key {'.'.join(path)!r}; {hint}{more}"
    if first["type"] == "missing":
        return f"configuration key {'.'.join(path)!r} is required{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    path = [part for part in path if part not in ("str", "list[str]")]
    return f"configuration key {'.'.join(path)!r}: {message}, not {first['input']!r}{more}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return list(model.model_fields)
        model = annotation
    return list(model.model_fields)

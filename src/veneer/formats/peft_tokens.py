"""PEFT's TRAINABLE_TOKENS adapters: trained embedding rows and nothing else, which its LORA adapters cannot be alone."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import Tensor

from veneer.errors import AdapterFormatError
from veneer.formats.peft_tensors import PREFIX, TOKENS

PEFT_TYPE = "TRAINABLE_TOKENS"
ALONE = ".trainable_tokens_delta"
"""Ending of a tensor's key in such an adapter; in a LORA adapter `TOKENS`."""


def as_lora_fields(fields: dict[str, Any], source: object) -> dict[str, Any]:
    """TrainableTokensConfig's fields as those of a LoraConfig that adapts no module. Raises `AdapterFormatError`."""
    modules, ids = fields.get("target_modules"), fields.get("token_indices")
    if isinstance(modules, str) and re.fullmatch(r"[\w.]+", modules):
        modules = [modules]  # PEFT writes the input embedding's name so
    if isinstance(modules, str) or not ids:
        what = "target_modules is a regular expression: make it a list" if ids else "token_indices is empty"
        raise AdapterFormatError(f"{source}: a {PEFT_TYPE} adapter whose {what}")
    tokens = {module: ids for module in modules} if modules else ids
    kept = {key: value for key, value in fields.items() if key not in ("token_indices", "init_weights")}
    return kept | {"peft_type": "LORA", "target_modules": [], "trainable_token_indices": tokens}


def as_lora_key(key: str) -> str:
    """A tensor's key as a LORA adapter has it."""
    return f"{key.removesuffix(ALONE)}.{TOKENS}" if key.endswith(ALONE) and not key.endswith(f".{TOKENS}") else key


def without_lora(
    fields: dict[str, Any], tensors: dict[str, Tensor], tied_head: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's file as PEFT can load it: one of trained tokens alone as TRAINABLE_TOKENS, any other as it is.

    That form has one list of ids and neither whole modules nor biases; an adapter without factors that has them is left
    a LORA adapter, with a warning that PEFT refuses it. A `tied_head` has the rows of its embedding again, as in PEFT.
    """
    indices = fields["trainable_token_indices"]
    if not indices or fields["target_modules"] or fields["target_parameters"]:
        return fields, tensors
    lists = [tuple(ids) for ids in indices.values()]
    if len(set(lists)) > 1 or not all(key.endswith(f".{TOKENS}") for key in tensors):
        warnings.warn(
            "this adapter has no low-rank factors, and other parts than one list of trained tokens: Veneer loads it, "
            "PEFT does not (name a module in target_modules too)",
            stacklevel=3,
        )
        return fields, tensors
    shared = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode")
    own = {"peft_type": PEFT_TYPE, "target_modules": list(indices), "token_indices": list(lists[0])}
    renamed = {key.removesuffix(f".{TOKENS}") + ALONE: value for key, value in tensors.items()}
    if tied_head and len(renamed) == 1:
        renamed[f"{PREFIX}{tied_head}{ALONE}"] = next(iter(renamed.values())).clone()
    return {key: fields[key] for key in shared} | own | {"init_weights": True}, renamed

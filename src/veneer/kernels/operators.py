"""Operators of our own, which the compiler takes as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

_library = torch.library.Library("veneer", "FRAGMENT")


def define(schema: str, kernels: Mapping[str, Callable], shape_only: Callable) -> None:
    """Register torch.ops.veneer.NAME by its schema, a kernel for each dispatch key, and its twin without data.

    A module that is imported anew finds its operator there and leaves it.
    """
    name = schema.split("(")[0]
    if hasattr(torch.ops.veneer, name):
        return
    _library.define(schema)
    for key, kernel in kernels.items():
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"veneer::{name}", shape_only, lib=_library)

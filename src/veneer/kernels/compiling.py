"""torch.compile with a way back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def compile_or_plain(
    function: Callable, *, dynamic: bool | None = None, note: Callable[[str], None] | None = None
) -> Callable:
    """`function` compiled; if the compiler fails, that call and all later ones run it as it is.

    The failure is told once, through `note` or as a warning.
    """
    fast = torch.compile(function, dynamic=dynamic)
    state = {"failed": False}

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not state["failed"]:
            try:
                return fast(*args, **kwargs)
            except (torch._dynamo.exc.TorchDynamoException, ImportError) as error:
                state["failed"] = True
                text = f"compiling {function.__qualname__} failed, it runs uncompiled: {str(error).splitlines()[0]}"
                (note or warnings.warn)(text)
        return function(*args, **kwargs)

    return call

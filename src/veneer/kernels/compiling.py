"""torch.compile with a way back, and with a say in what is kept for the backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch


@cache
def backend(keep: float, lean: bool = False) -> Callable:
    """Inductor as a backend of torch.compile that keeps a share of what it could keep for the backward pass.

    1 keeps all that saves work; below it, the compiler chooses what to compute again by a knapsack over operations whose
    worth is their floating-point operations, so that element-wise ones go first; 0 keeps the inputs alone. Code that is
    compiled with one share is not taken for another. `lean`: the backward pass unpacks 4-bit matrices anew, each when
    it is used, so that no block's are there all at once.
    """

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        from veneer.kernels.gated_mlp import graph_gated_mlps
        from veneer.kernels.group import graph_groups

        graph_groups(graph, again=lean or keep > 0)
        graph_gated_mlps(graph, low_again=keep < 0.5)  # so little kept, x Aᵀ would be computed again, and its x with it
        with config.patch(activation_memory_budget=keep):
            return compile_fx(graph, inputs)

    return compile_graph


def compile_or_plain(
    function: Callable,
    *,
    keep: float = 1.0,
    lean: bool = False,
    dynamic: bool | None = None,
    otherwise: Callable | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> Callable:
    """`function` compiled; if the compiler fails, that call and all later ones run `otherwise` (absent: `function`).

    The failure is told once, through `note`.
    """
    fast = torch.compile(function, dynamic=dynamic, backend=backend(keep, lean))
    otherwise = otherwise or function
    failed = False

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return fast(*args, **kwargs)
            except (torch._dynamo.exc.TorchDynamoException, ImportError) as error:
                failed = True
                name = getattr(function, "__qualname__", type(function).__name__)
                note(f"compiling {name} failed, so it runs uncompiled: {_reason(error)}")
        return otherwise(*args, **kwargs)

    return call


def _reason(error: BaseException) -> str:
    """The first line of what lies at the bottom of a compiler's error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"

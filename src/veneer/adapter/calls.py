"""Which modules a model calls, in what order, and which of them with one and the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, int]]]:
    """While it lasts, each call of these modules is added to the list as (name, a number for its first input)."""
    calls: list[tuple[str, int]] = []
    inputs: list[Tensor] = []  # held, so that no other tensor gets an id that was used

    def note(name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            inputs.append(args[0])
            calls.append((name, id(args[0])))

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()

"""Gradient checkpointing runs blocks again in the backward pass: with the adapters that acted in their forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.layers import Routing
from veneer.kernels.ranges import Ranges

State = tuple[dict[str, float], tuple[str | None, ...] | None, dict[str, Tensor | None], Ranges | None]


class Replay:
    """Notes at each training call who acted (stack, rows, aLoRA's places, ranges), and puts it back for the call's own
    gradient.

    Between a call and its backward pass another adapter may have been activated, a `route` block left, or a sequence
    with another invocation read. When the backward pass ends, the present state returns. Modules that an adapter swaps
    in whole (modules_to_save, biases) are not covered.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.present: State | None = None

    def remember(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After a call: hook the gradient of each tensor that came out."""
        if not (module.training and torch.is_grad_enabled()):
            return
        then = self._state()
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
        for part in parts:
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(partial(self._replay, then))

    def _replay(self, then: State, gradient: Tensor) -> None:
        if self.present is None:
            self.present = self._state()
            torch.autograd.Variable._execution_engine.queue_callback(self._return)
        self._set(then)

    def _return(self) -> None:
        self._set(self.present)
        self.present = None

    def _state(self) -> State:
        return self.routing.stack, self.routing.rows, dict(self.routing.tokens), self.routing.ranges

    def _set(self, state: State) -> None:
        self.routing.stack, self.routing.rows, self.routing.tokens = state[0], state[1], dict(state[2])
        self.routing.ranges = state[3]


def watch_calls(model: nn.Module, routing: Routing) -> list[Callable[[], None]]:
    """Hook a model and its body, which may be called alone; what comes back ends it."""
    replay = Replay(routing)
    modules = {id(m): m for m in (model, getattr(model, "base_model", model))}.values()
    return [module.register_forward_hook(replay.remember).remove for module in modules]

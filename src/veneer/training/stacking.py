"""Adapters of one packed row, stacked for compiled blocks: outside of the compiled code, so that it is the same for any
number of adapters.

A block that reads each adapter's factors by itself is traced, checked and compiled in time that grows with their number;
here it reads two matrices for each linear.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from veneer.adapter.layers import AdaptedLinear


def stacking(block: nn.Module, forward: Callable) -> Callable:
    """`forward` of a compiled block with `AdaptedLinear.stacked` in place wherever tokens are routed.

    The stacks of a block are made right before it runs, so that autograd hands their gradients on to the adapters right
    after its backward pass: gradients of one block's stacks at most are there at once. The stacks themselves, in the
    base's dtype, are kept until then.
    """

    layers = [layer for layer in block.modules() if isinstance(layer, AdaptedLinear)]

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        stacked = [layer for layer in layers if layer.routing.ranges is not None]
        for layer in stacked:
            layer.stacked = layer.stack(layer.routing.ranges)
        try:
            return forward(*args, **kwargs)
        finally:
            for layer in stacked:
                layer.stacked = None

    return call

"""Small gradients added to their sums many at a time: a kernel for each of an adapter's factors costs more than its work.

Autograd adds a gradient to a parameter's `grad` as soon as it is there, by a kernel of its own. Here `grad` is away while
that happens, so autograd only puts the new gradient there; those of a few blocks are then added by one kernel. Outside
of a backward pass `grad` is the sum, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MOST = 64
"""Gradients of one addition: as many as one kernel of `torch._foreach_add_` takes."""
BYTES = 16 << 20
"""Bytes of gradients after which they are added: what this costs in memory, and one gradient more."""
SMALL = 4 << 20
"""Bytes above which a gradient is added by itself."""


class Sums:
    """Adds the gradients of parameters of one device and dtype to `sums`, tensors like them that are their `grad`.

    A parameter whose `grad` is another tensor is left to autograd.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sums: Sequence[Tensor]) -> None:
        self.parameters, self.sums = list(parameters), list(sums)
        self.waiting: list[int] = []
        """Parameters whose sum was taken away, in the order in which gradients came."""
        self.bytes = 0

    def hook(self) -> Callable[[], None]:
        """Begin; what comes back ends it."""
        handles = []
        for i, p in enumerate(self.parameters):
            if p.numel() * p.element_size() <= SMALL:
                handles.append(p.register_hook(partial(self._before, i)))
                handles.append(p.register_post_accumulate_grad_hook(partial(self._after, i)))
        return partial(_remove_all, handles)

    def _before(self, i: int, gradient: Tensor) -> None:
        if self.parameters[i].grad is self.sums[i]:
            if not self.waiting:
                torch.autograd.Variable._execution_engine.queue_callback(self.add)
            self.parameters[i].grad = None
            self.waiting.append(i)
            self.bytes += self.sums[i].numel() * self.sums[i].element_size()

    def _after(self, i: int, parameter: Tensor) -> None:
        if len(self.waiting) >= MOST or self.bytes >= BYTES:
            self.add()

    @torch.no_grad()
    def add(self) -> None:
        """Add what has come, and put the sums back."""
        waiting, self.waiting, self.bytes = self.waiting, [], 0
        came = [(self.sums[i], self.parameters[i].grad) for i in waiting]
        came = [(total, gradient) for total, gradient in came if gradient is not None]
        if came:
            torch._foreach_add_([total for total, _ in came], [gradient for _, gradient in came])
        for i in waiting:
            self.parameters[i].grad = self.sums[i]

    def forget(self) -> None:
        """Drop what has come, as after a backward pass that failed, and put the sums back."""
        self.waiting, self.bytes = [], 0
        for p, total in zip(self.parameters, self.sums):
            p.grad = total


def _remove_all(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()

"""Long rows in less memory: a block's MLP takes a row's tokens in chunks, each computed again in the backward pass.

What an MLP makes on its way is several times as wide as the hidden states, so for a row of many tokens it is most of
what a block needs at once. An MLP looks at each token alone; that is tried before it is made use of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.adapter.layers import AdaptedModule

LONG = 16384
"""Rows of more tokens than this are computed in chunks, where that is asked for."""
CHUNK = 4096
"""Tokens of a chunk."""
FEW = 8
"""Tokens on which a chunked MLP is compared with the whole one."""


def token_modules(block: nn.Module) -> list[nn.Module]:
    """The outermost parts of a block that its classes call MLP or feed-forward and that hold linears."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for part in block.modules():
        name = type(part).__name__.lower()
        if part is block or id(part) in inside or not name.endswith(("mlp", "feedforward", "ffn")):
            continue
        inside |= {id(m) for m in part.modules()}
        if any(isinstance(m, (AdaptedModule, nn.Linear)) for m in part.modules()):
            found.append(part)
    return found


class Chunked:
    """Functions of a block whose MLPs take long rows in chunks; `random` if they draw random numbers.

    An MLP that fails the comparison, or is called with more than the hidden states, runs whole; `note` says so once.
    """

    def __init__(self, random: bool, note: Callable[[str], None]) -> None:
        self.random, self.note = random, note
        self.known: dict[type, bool] = {}
        """Whether an MLP's class passed."""

    def block(self, block: nn.Module, forward: Callable) -> Callable:
        """A block's `forward` with its MLPs in chunks."""
        parts = token_modules(block)

        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._installed(parts):
                return forward(*args, **kwargs)

        return call

    @contextmanager
    def _installed(self, parts: list[nn.Module]) -> Iterator[None]:
        before = [part.__dict__.get("forward") for part in parts]
        for part in parts:
            part.forward = self._chunked(part, part.forward)
        try:
            yield
        finally:
            for part, forward in zip(parts, before):
                if forward is None:
                    del part.forward
                else:
                    part.forward = forward

    def _chunked(self, part: nn.Module, own: Callable) -> Callable:
        @wraps(own)
        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = x.shape[-2] if isinstance(x, Tensor) and x.ndim > 1 else 0
            if tokens <= CHUNK or args or kwargs or not self._passes(part, own, x):
                return own(x, *args, **kwargs)
            parts = x.split(CHUNK, dim=-2)
            if not torch.is_grad_enabled():
                return torch.cat([own(piece) for piece in parts], dim=-2)
            again = {"use_reentrant": False, "preserve_rng_state": self.random}
            return torch.cat([checkpoint(own, piece, **again) for piece in parts], dim=-2)

        return call

    def _passes(self, part: nn.Module, own: Callable, x: Tensor) -> bool:
        if type(part) not in self.known:
            self.known[type(part)] = token_wise(part, own, x)
            if not self.known[type(part)]:
                self.note(f"{type(part).__name__} does not look at each token alone, so it runs on whole rows")
        return self.known[type(part)]


@torch.no_grad()
def token_wise(part: nn.Module, forward: Callable, x: Tensor) -> bool:
    """Whether `forward` of a module gives a few of these tokens (…, T, d), taken in two parts, what it gives them whole."""
    x, training = x[..., :FEW, :], [m for m in part.modules() if m.training]
    for module in training:
        module.training = False  # no dropout
    try:
        whole = forward(x)
        if not isinstance(whole, Tensor) or whole.shape[:-1] != x.shape[:-1]:
            return False
        pieces = torch.cat([forward(x[..., :3, :]), forward(x[..., 3:, :])], dim=-2)
    finally:
        for module in training:
            module.training = True
    tolerance = 8 * torch.finfo(whole.dtype).eps
    return bool((whole - pieces).float().norm() <= tolerance * whole.float().norm())

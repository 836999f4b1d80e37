"""Activated LoRA: an adapter that acts only from its invocation tokens on (Greenewald et al. 2025, arXiv:2504.12397)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.bank import Bank


def acting_tokens(ids: Tensor, invocation: Sequence[int]) -> Tensor:
    """Where the adapter acts: ids (batch, tokens) → bool (batch, tokens).

    True from the start of the last occurrence of `invocation` in a row to the row's end; nowhere if there is none.
    """
    length, n = ids.shape[1], len(invocation)
    if length < n:
        return torch.zeros_like(ids, dtype=torch.bool)
    wanted = torch.tensor(invocation, device=ids.device)
    hits = (ids.unfold(1, n, 1) == wanted).all(-1)
    places = torch.arange(hits.shape[1], device=ids.device).expand_as(hits)
    first = torch.where(hits, places, -1).max(1).values
    first = torch.where(first < 0, length, first)
    return torch.arange(length, device=ids.device) >= first.unsqueeze(1)


class Watch:
    """Keeps `Routing.tokens[name]` in step with what the model reads.

    A call with a filled cache goes on where the last one ended: what it read then is kept, so that an invocation that
    the model generates itself, or that two calls share, is seen.
    """

    def __init__(self, bank: Bank, name: str, invocation: Sequence[int]) -> None:
        self.routing, self.name, self.invocation = bank.routing, name, invocation
        self.read: Tensor | None = None
        self.inside = False

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the whole model runs: what it is given holds, whatever it hands to its parts."""
        self.inside = False
        self(module, args, kwargs)
        self.inside = self.read is not None

    def leave(self, *_: Any) -> None:
        """After the whole model ran."""
        self.inside = False

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.inside:
            return
        ids = kwargs.get("input_ids")
        if ids is None and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            ids = args[0]
        if ids is None:
            self.routing.tokens[self.name] = self.read = None
            return
        cache = kwargs.get("past_key_values")
        filled = cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0
        whole = ids
        if filled and self.read is not None and len(self.read) == len(ids) and self.read.shape[1] >= filled:
            whole = torch.cat([self.read[:, :filled], ids], dim=1)
        self.read = whole
        self.routing.tokens[self.name] = acting_tokens(whole, self.invocation)[:, -ids.shape[1] :]


def watch_invocation(bank: Bank, name: str, invocation: Sequence[int]) -> Callable[[], None]:
    """Watch the input ids of the model, and of its body, which may be called alone; what comes back ends it."""
    watch, model = Watch(bank, name, list(invocation)), bank.model
    bank.routing.tokens[name] = None
    body = getattr(model, "base_model", model)
    handles = [model.register_forward_pre_hook(watch.enter, with_kwargs=True)]
    handles += [model.register_forward_hook(watch.leave, always_call=True)]
    if body is not model:
        handles += [body.register_forward_pre_hook(watch, with_kwargs=True)]
    return partial(_remove_all, handles)


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()

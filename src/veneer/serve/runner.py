"""The model as the engine sees it: pieces of prompts or single tokens in, logits out, into slots and through adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.calls import recorded
from veneer.adapter.targets import output_head
from veneer.base.quant import unmap
from veneer.kernels.grouped import has_grouped_mm
from veneer.serve.cache import ATTENTION, Prompts, SlotCache, Tokens
from veneer.serve.errors import ServeError
from veneer.serve.packed import PackedLinear, packable
from veneer.serve.pool import Pool, groups_of
from veneer.serve.registry import Registry
from veneer.serve.routing import Grouped, GroupState, Plan, RoutedLinear, Routing, Segments, Uses, plan_rows

NOISE, NOISE_IN_HALF = 1e-3, 0.15
"""How far logits may be from the model's own, as a share of their norm: two orders of the same sums in bfloat16 differ by
2 % after 8 blocks of random weights, and by more after more; a key that is missing or out of place changes them wholly."""
Piece = tuple[int, int, list[int], Uses]
"""(slot, position of the first token, tokens, adapters)."""


def head_sizes(config: Any) -> tuple[int, int, int]:
    """(heads, key heads, width of a head) of a text config."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


class Runner:
    """Owns the model while it is served; `close` puts everything back as it was."""

    lookahead = False
    """Whether a step may be begun before the host has seen the tokens of the one before."""
    power_ranks = False
    """Whether kernels want the pool's rank to be a power of two."""
    most = 4096
    """Tokens of prompts in one pass."""

    def __init__(self, model: Any, registry: Registry, slots: int, context: int) -> None:
        self.model, self.device = model, registry.device
        config = model.config.get_text_config()
        if not getattr(model, "_supports_attention_backend", False):
            raise ServeError(f"{type(model).__name__} does not take a custom attention, which serving needs")
        _, heads, width = head_sizes(config)
        dtype = model.get_input_embeddings().weight.dtype
        self.cache = SlotCache(config.num_hidden_layers, self._slots(slots), context, heads, width, dtype, self.device)
        self.slots, self.routing = slots, Routing()
        calls, expected = self._trace(registry)
        groups, places = groups_of(calls, registry.targets), registry.device_slots or slots
        self.pool = Pool(registry, groups, places, self.device, dtype, self.power_ranks)
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._own_attention = config._attn_implementation
        try:
            self._pack()
            self._install()
            self._check(expected)
        except BaseException:
            self.close()
            raise

    def _slots(self, slots: int) -> int:
        return slots

    def prepare(self) -> None:
        """Make room for the adapters that are loaded now, before the first request."""
        rank, targets = self.pool.registry.extent()
        if targets:
            self.pool.grow(rank, targets)

    def close(self) -> None:
        """Take the adapters out of the model and give it its own attention back."""
        for owner, leaf, module in reversed(self._replaced):
            here = getattr(owner, leaf)
            setattr(owner, leaf, here.unpack() if hasattr(here, "unpack") else module)
        self._replaced.clear()
        self.model.set_attn_implementation(self._own_attention)

    @torch.inference_mode()
    def prompts(self, pieces: Sequence[Piece], last: Sequence[bool]) -> Tensor | None:
        """Run pieces of prompts; logits (N, V) float32 after those for which `last` says that they end the prompt."""
        batch = Prompts(self.cache, [(slot, first, len(tokens)) for slot, first, tokens, _ in pieces], self.device)
        segments, ends, at = [], [], 0
        for (_, _, tokens, uses), wanted in zip(pieces, last):
            segments.append((at, at + len(tokens), uses))
            at += len(tokens)
            if wanted:
                ends.append((at - 1, uses))
        ids = torch.tensor([token for _, _, tokens, _ in pieces for token in tokens], device=self.device)
        self.routing.body = self._plan(segments)
        self.routing.head = Segments([(n, n + 1, uses) for n, (_, uses) in enumerate(ends)])
        keep = torch.tensor([end for end, _ in ends], device=self.device)
        return self._forward(ids, batch, keep) if ends else self._forward(ids, batch, None)

    @torch.inference_mode()
    def tokens(self, rows: Sequence[tuple[int, int, int, Uses]], ahead: Tensor | None = None) -> Tensor:
        """One token (slot, position, token, adapters) for each row → logits (B, V) float32; slots in ascending order."""
        batch = Tokens(self.cache, [(slot, position) for slot, position, _, _ in rows], self.device)
        self.routing.body = self.routing.head = plan_rows([uses for *_, uses in rows], self.device)
        ids = torch.tensor([token for _, _, token, _ in rows], device=self.device)
        return self._forward(ids, batch, 0)

    def _plan(self, segments: Sequence[tuple[int, int, Uses]]) -> Plan:
        if has_grouped_mm() and Grouped.takes(segments, self.cache.store):
            return Grouped(segments, self.pool.size, self.device)
        return Segments(segments)

    def _forward(self, ids: Tensor, batch: Any, keep: Tensor | int | None) -> Tensor | None:
        model = self.model if keep is not None else self.model.base_model
        options = {} if keep is None else {"logits_to_keep": keep}
        try:
            out = model(
                input_ids=ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                veneer_batch=batch,
                **options,
            )
        finally:
            self.routing.body = self.routing.head = None
        return None if keep is None else out.logits[0].float()

    def _trace(self, registry: Registry) -> tuple[list[tuple[str, int]], Tensor]:
        """The order in which the linears are called and the inputs they share, and the model's own logits (T, V)."""
        self._sample = torch.arange(1, 9, device=self.device) % self.model.config.get_text_config().vocab_size
        with torch.inference_mode(), recorded({t: self.model.get_submodule(t) for t in registry.targets}) as calls:
            logits = self.model(input_ids=self._sample[None], use_cache=False).logits[0].float()
        names = [name for name, _ in calls]
        if len(set(names)) != len(names):
            raise ServeError(f"{type(self.model).__name__} calls a layer twice, which cannot be served")
        return calls, logits

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        self._replaced.append((owner, leaf, getattr(owner, leaf)))
        setattr(owner, leaf, module)

    def _pack(self) -> None:
        found = packable(self.model)
        for name, shared in found.items():
            self._replace(name, PackedLinear(self.model.get_submodule(name), shared))
        if found:
            unmap(self.model)  # the plain weights' pages go with what stays beside them in the file

    def _install(self) -> None:
        head = output_head(self.model)
        for group in self.pool.groups:
            modules = [self.model.get_submodule(target) for target in group.targets]
            state = GroupState(group, modules, self.pool, self.routing, modules[0] is head)
            for part, (target, module) in enumerate(zip(group.targets, modules)):
                self._replace(target, RoutedLinear(module, state, part))
        self.model.set_attn_implementation(ATTENTION)

    def _check(self, expected: Tensor) -> None:
        """Refuse a model that gives other logits through slots than by itself."""
        ids, middle = self._sample.tolist(), len(self._sample) // 2
        try:
            self.prompts([(0, 0, ids[:middle], ())], [False])
            got = [self.prompts([(0, middle, ids[middle:-1], ())], [True]).clone()]
            got.append(self.tokens([(0, len(ids) - 1, ids[-1], ())]))
        except Exception as error:  # a model's, a kernel's or a compiler's
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ServeError(f"{type(self.model).__name__} cannot be served: {reason}") from error
        error = float((torch.cat(got) - expected[-2:]).norm() / expected[-2:].norm())
        most = NOISE if self.cache.store.dtype == torch.float32 else NOISE_IN_HALF
        if not error <= most:
            how = f"off by {error:.2g} of their norm, where rounding explains {most:g}"
            raise ServeError(f"{type(self.model).__name__} gives other logits through the engine's cache ({how})")

"""The adapters on a model: activate one, stack several, route rows, switch off, remove."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any
from weakref import ref

from torch import Tensor, nn

from veneer.adapter.layers import AdaptedModule, Routing, Stream, TrainedTokens, plain
from veneer.adapter.report import AttachReport, count
from veneer.adapter.targets import output_head
from veneer.config import AdapterConfig
from veneer.errors import AdapterStateError
from veneer.kernels.ranges import Ranges

NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What an adapter may be called: names stand in parameters' names and in files."""
TAKEN = {*dir(nn.ParameterDict()), *dir(nn.ModuleDict())}
"""What torch's tables of factors cannot hold under its name: their own methods and attributes."""


def check_name(name: object) -> None:
    """Raise `AdapterStateError` for what no adapter can be called."""
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise AdapterStateError(f"adapter name {name!r}: use letters, digits, '_' and '-'")
    if name in TAKEN:
        raise AdapterStateError(f"adapter name {name!r} is that of an attribute of torch's modules: choose another")


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers in a module's state dict, by name."""
    state = module.state_dict(keep_vars=True)
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)}


@dataclass
class Entry:
    """One adapter: its configuration, and what it swaps in whole while it is active.

    `targets` names the layers that hold its factors and `tokens` the embeddings with trained rows; `modules` maps
    module name → trained copy (modules_to_save); `biases` maps parameter name → trained copy.
    """

    config: AdapterConfig
    targets: list[str]
    tokens: list[str] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, nn.Parameter] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)


class Bank:
    """The adapters on one model; `veneer.attach` makes it and `veneer.get_bank` finds it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self.routing = Routing()
        self.entries: dict[str, Entry] = {}
        self.layers: dict[str, AdaptedModule] = {}
        """Target name → the layer that holds factors for it."""
        self.tokens: dict[str, TrainedTokens] = {}
        """Embedding name → its trained rows."""
        self.wrappers: list[AdaptedModule] = []
        """What stands in the model in place of a module of the base."""
        self.slots: dict[str, Any] = {}
        """Adapters whose factors can be exchanged in place, by name; see `veneer.adapter.slot`."""
        self.frozen: dict[str, bool] = {}
        self.fingerprint: dict | None = None
        self.undo: list[Callable[[], None]] = []
        """What `detach` must undo besides."""
        self.merged: dict[str, float] | None = None
        """The adapters that are merged into the base now, with their weights."""
        self._unmerged: list[tuple[AdaptedModule, nn.Module]] = []
        self._originals: dict[str, nn.Module | nn.Parameter] = {}
        self._aside: list[dict[str, float]] = []
        """The stacks that return when `disabled` and `route` blocks end."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_model": ref(state["_model"])}

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        """The bank of the copied model; a bank is copied with its model only."""
        if id(self.model) not in memo:
            raise AdapterStateError("a bank is part of its model: copy the model (copy.deepcopy(model))")
        new = memo[id(self)] = Bank(memo[id(self.model)])
        new.__dict__ |= {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_model"}
        return new

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self._model()

    @property
    def names(self) -> list[str]:
        """Names of all adapters, in the order they came."""
        return list(self.entries)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their weights."""
        return dict(self.routing.stack)

    def check(self, name: str) -> Entry:
        """The entry of an adapter; `AdapterStateError` if there is none of that name."""
        if name not in self.entries:
            raise AdapterStateError(f"no adapter {name!r} here; there are: {', '.join(self.names) or 'none'}")
        return self.entries[name]

    def activate(self, which: str | Mapping[str, float] | None) -> None:
        """Make one adapter act, or a weighted stack of several ({name: weight}), or none (the base alone).

        Adapters that bring whole modules or biases cannot be stacked or weighted: `AdapterStateError`.
        """
        if self.merged is not None:
            raise AdapterStateError(f"{', '.join(self.merged) or 'nothing'} is merged into the base: unmerge() first")
        if not (which is None or isinstance(which, (str, Mapping))):
            raise AdapterStateError(f"activate takes a name, {{name: weight}} or None, not {which!r}")
        stack = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
        odd = next((w for w in stack.values() if not (isinstance(w, Real) and math.isfinite(w))), None)
        if odd is not None:
            raise AdapterStateError(f"an adapter's weight is a finite number, not {odd!r}")
        swaps = [name for name in stack if self.check(name).modules or self.entries[name].biases]
        if swaps and (len(stack) > 1 or stack[swaps[0]] != 1.0):
            raise AdapterStateError(
                f"adapter {swaps[0]!r} trains whole modules or biases, which cannot be stacked or weighted"
            )
        self._swap_back()
        self.routing.stack, self.routing.rows = stack, None
        if swaps:
            self._swap_in(self.entries[swaps[0]])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, for the length of a `with` block."""
        with self._restoring():
            self.activate(None)
            yield

    @contextmanager
    def route(self, rows: Sequence[str | None]) -> Iterator[None]:
        """Each batch row its own adapter (None: the base alone), for the length of a `with` block."""
        for name in {row for row in rows if row is not None}:
            if self.check(name).modules or self.entries[name].biases:
                raise AdapterStateError(f"adapter {name!r} trains whole modules or biases, which rows cannot share")
        with self._restoring():
            self.activate(None)
            self.routing.rows = tuple(rows)
            yield

    def lone(self, name: str) -> str | None:
        """Why an adapter cannot share a packed row with others (`route_tokens`); None if it can."""
        entry, head = self.check(name), output_head(self.model)
        kinds = {self.layers[path].kind for path in entry.targets} - {"linear", "embedding"}
        if entry.modules or entry.biases:
            return "it trains whole modules or biases"
        if entry.tokens:
            return "it trains embedding rows (trainable_tokens, new_tokens)"
        if entry.config.invocation:
            return "it acts from its invocation on (aLoRA), which is found by whole rows"
        if isinstance(head, AdaptedModule) and (name in head.lora_A or name in getattr(head, "names", ())):
            return "it adapts the output head"
        return f"it adapts {', '.join(sorted(kinds))} modules" if kinds else None

    @contextmanager
    def route_tokens(self, lengths: Mapping[str, int], streams: Mapping[str, Stream] | None = None) -> Iterator[None]:
        """Each adapter its own run of the tokens of one packed row, in this order, for the length of a `with` block.

        The backward pass belongs in the block too. The runs cover the row; a length may be 0. `streams` are the random
        numbers for each adapter's dropout. Raises `AdapterStateError` for an adapter that `lone` says cannot be routed so.
        """
        for name in lengths:
            if reason := self.lone(name):
                raise AdapterStateError(f"adapter {name!r} cannot share a row with others: {reason}")
        device = next(self.model.parameters()).device
        with self._restoring():
            self.activate(None)
            self.routing.ranges, self.routing.streams = Ranges.of(lengths, device), dict(streams or {})
            try:
                yield
            finally:
                self.routing.ranges, self.routing.streams = None, {}

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        merged, ready = self.merged, [(layer, layer.base_layer) for layer in self.wrappers]
        if merged is not None:
            self.unmerge()
        stack, rows = dict(self.routing.stack), self.routing.rows
        self._aside.append(stack)
        try:
            yield
        finally:
            self._aside.pop()
            self.activate(stack)
            self.routing.rows = rows
            if merged is not None:
                self._put_in(ready)
                self.merged = merged

    def merge(self) -> None:
        """Put the active adapters' sum into the base's weights: W + Σ w_n ΔW_n, added in float32 and rounded once.

        The base's own modules are kept aside, so `unmerge` restores every bit; until then the model holds both. Merging
        what is merged already changes nothing. Raises `AdapterStateError` for a quantised base, an activated adapter
        (aLoRA), a grouped convolution, a sum that is not finite, or while no adapter is active or rows are routed.
        """
        if self.merged is not None:
            return
        if self.routing.rows is not None:
            raise AdapterStateError("rows are routed to different adapters: a merge has one sum for all")
        acting = dict(self.routing.stack)
        if not acting:
            raise AdapterStateError(
                f"no adapter is active, so nothing to merge; there are: {', '.join(self.names) or 'none'}"
            )
        ready = [(layer, layer.merged(acting)) for layer in self.wrappers]
        for layer, module in ready:
            for key, value in module.named_parameters():
                if value.is_floating_point() and not value.isfinite().all():
                    name = next((n for n, one in self.layers.items() if one is layer), type(layer).__name__)
                    raise AdapterStateError(f"{name}.{key} would hold NaN or infinite values: nothing was merged")
        self._put_in(ready)
        self.merged = acting

    def _put_in(self, ready: list[tuple[AdaptedModule, nn.Module]]) -> None:
        self._unmerged = [(layer, layer.base_layer) for layer, _ in ready]
        for layer, module in ready:
            layer.base_layer = module
        self.routing.stack = {}

    def unmerge(self) -> None:
        """Put the base's own modules back, bit for bit, and let the adapters act beside them again."""
        if self.merged is None:
            raise AdapterStateError("nothing is merged")
        for layer, module in self._unmerged:
            layer.base_layer = module
        self.routing.stack, self.merged = self.merged, None
        self._unmerged.clear()

    def remove(self, name: str) -> None:
        """Drop an adapter and free its memory; a layer without adapters keeps its place until `detach`."""
        self.check(name)
        if self.merged is not None:
            raise AdapterStateError("adapters are merged into the base: unmerge() first")
        if name in self.routing.stack:
            self.activate({n: w for n, w in self.routing.stack.items() if n != name})
        for stack in self._aside:
            stack.pop(name, None)
        for layer in self.wrappers:
            layer.remove(name)
        for undo in self.entries.pop(name).undo:
            undo()
        self.routing.tokens.pop(name, None)
        self.slots.pop(name, None)

    def rename(self, name: str, new: str) -> None:
        """Give an adapter another name; it stays active if it was. Raises `AdapterStateError` (taken, or no name)."""
        entry = self.check(name)
        check_name(new)
        if new in self.entries:
            raise AdapterStateError(f"adapter name {new!r} is taken: choose another")
        if entry.config.invocation:
            raise AdapterStateError(f"adapter {name!r} is watched under its name (aLoRA): load it under the new one")
        for layer in self.wrappers:
            layer.rename(name, new)
        for table in (self.entries, self.slots, self.routing.stack, self.merged or {}, *self._aside):
            if name in table:
                renamed = {new if key == name else key: value for key, value in table.items()}  # in the same order
                table.clear(), table.update(renamed)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's trained parameters under stable names: <module>.lora_A, <module>.lora_B, <module>.<own name>.

        Besides, where the configuration asks for them: <module>.lora_magnitude_vector, <module>.lora_bias,
        <embedding>.trainable_tokens.
        """
        entry, found = self.check(name), {}
        for layers, paths in ((self.layers, entry.targets), (self.tokens, entry.tokens)):
            for path in paths:
                found |= {f"{path}.{leaf}": parameter for leaf, parameter in layers[path].trained(name).items()}
        for path, module in entry.modules.items():
            found |= {f"{path}.{key}": value for key, value in module.named_parameters()}
        return found | entry.biases

    def buffers(self, name: str) -> dict[str, Tensor]:
        """The tensors that an adapter's whole modules hold besides their parameters and are saved with them: <module>.<own
        name>, such as the running means of a BatchNorm."""
        return {
            f"{path}.{key}": value
            for path, module in self.check(name).modules.items()
            for key, value in saved_buffers(module).items()
        }

    def report(self, name: str | None = None) -> AttachReport:
        """What an adapter (the newest, if not named) trains: parameters, share, size on disk; prints as one line."""
        newest = self.names[-1] if self.names else "default"
        self.check(name or newest)
        return count(self, name or newest)

    def _swap_in(self, entry: Entry) -> None:
        for name, new in {**entry.modules, **entry.biases}.items():
            parent, _, leaf = name.rpartition(".")
            owner = self.owner(parent)
            self._originals[name] = getattr(owner, leaf)
            setattr(owner, leaf, new)

    def _swap_back(self) -> None:
        for name, old in self._originals.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.owner(parent), leaf, old)
        self._originals.clear()

    def owner(self, path: str) -> nn.Module:
        """The base module at a path, looking through the adapted layers on the way."""
        module = self.model
        for part in path.split(".") if path else ():
            module = plain(getattr(module, part))
        return module

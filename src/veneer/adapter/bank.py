"""The adapters on a model: activate one, stack several, route rows, switch off, remove."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import ref

from torch import nn

from veneer.adapter.layers import AdaptedLinear, Routing
from veneer.adapter.report import AttachReport, count
from veneer.config import AdapterConfig
from veneer.errors import AdapterStateError


@dataclass
class Entry:
    """One adapter: its configuration, and what it swaps in whole while it is active.

    `modules` maps module name → trained copy (modules_to_save); `biases` maps parameter name → trained copy.
    """

    config: AdapterConfig
    targets: list[str]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, nn.Parameter] = field(default_factory=dict)


class Bank:
    """The adapters on one model; `veneer.attach` makes it and `veneer.get_bank` finds it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self.routing = Routing()
        self.entries: dict[str, Entry] = {}
        self.layers: dict[str, AdaptedLinear] = {}
        self.frozen: dict[str, bool] = {}
        self.fingerprint: dict | None = None
        self._originals: dict[str, nn.Module | nn.Parameter] = {}

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
        stack = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
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

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        stack, rows = dict(self.routing.stack), self.routing.rows
        try:
            yield
        finally:
            self.activate(stack)
            self.routing.rows = rows

    def remove(self, name: str) -> None:
        """Drop an adapter and free its memory; a layer without adapters keeps its place until `detach`."""
        self.check(name)
        if name in self.routing.stack:
            self.activate({n: w for n, w in self.routing.stack.items() if n != name})
        for layer in self.layers.values():
            if name in layer.lora_A:
                layer.remove(name)
        del self.entries[name]

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's trained parameters under stable names: <module>.lora_A, <module>.lora_B, <module>.<own name>."""
        entry, found = self.check(name), {}
        for path in entry.targets:
            found[f"{path}.lora_A"] = self.layers[path].lora_A[name]
            found[f"{path}.lora_B"] = self.layers[path].lora_B[name]
        for path, module in entry.modules.items():
            found |= {f"{path}.{key}": value for key, value in module.named_parameters()}
        return found | entry.biases

    def report(self, name: str | None = None) -> AttachReport:
        """What an adapter (the newest, if not named) trains: parameters, share, size on disk; prints as one line."""
        return count(self, name or self.names[-1])

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
        """The base module at a path, looking through the adapted layer that may stand there."""
        module = self.model.get_submodule(path)
        return module.base_layer if isinstance(module, AdaptedLinear) else module

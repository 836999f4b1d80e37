"""What all adapted layers share: the factors of every adapter on them, and who acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.adapter import math
from veneer.errors import AdapterStateError
from veneer.kernels.ranges import Ranges

TABLES = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_bias")
"""What an adapter may train in a layer; also the last part of its parameters' names."""


@dataclass
class Routing:
    """Which adapters act, shared by all layers of a bank.

    `stack` maps adapter → weight, for every row. `rows`, if set, wins: it names each batch row's own adapter, or None
    for the base alone. `tokens` maps an activated adapter (aLoRA) to the (batch, tokens) positions where it acts.
    `ranges`, if set, wins over both: it gives each adapter its own tokens of one packed row, and `streams` the random
    numbers that its dropout draws there.
    """

    stack: dict[str, float] = field(default_factory=dict)
    rows: tuple[str | None, ...] | None = None
    tokens: dict[str, Tensor | None] = field(default_factory=dict)
    ranges: Ranges | None = None
    streams: dict[str, Stream] = field(default_factory=dict)


class Stream:
    """Random numbers of an adapter's own: inside a `with` block, torch draws them as if it had been seeded with `seed`
    and had drawn nothing but in these blocks."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device, before = device, self._get(device)
        torch.manual_seed(seed)
        self.state = self._get(device)
        self._set(before)

    @staticmethod
    def _get(device: torch.device) -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def _set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self.device)

    def __enter__(self) -> None:
        self.outside = self._get(self.device)
        self._set(self.state)

    def __exit__(self, *error: object) -> None:
        self.state = self._get(self.device)
        self._set(self.outside)


@dataclass(frozen=True)
class Options:
    """How one adapter works in a layer, besides its rank and alpha; see `AdapterConfig` for each."""

    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    lora_bias: bool = False
    changes_base: bool = False


class AdaptedModule(nn.Module):
    """A frozen module and the factors of the adapters on it.

    lora_A[n] and lora_B[n] hold adapter n's factors in PEFT's shapes. Where an initialisation assumes the base
    W − s·B₀A₀ (PiSSA and its kin), lora_A_start[n] and lora_B_start[n] hold the frozen A₀ and B₀ and the layer acts with
    `factors`: [A; A₀] and [B, −B₀], so W itself never changes.
    """

    kind: ClassVar[str]

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.routing = routing
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector, self.lora_bias = nn.ParameterDict(), nn.ParameterDict()
        self.lora_A_start, self.lora_B_start = nn.ParameterDict(), nn.ParameterDict()
        self.rank: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()
        """By adapter, where it has some; modules, so that code which switches a model's dropout off finds them."""
        self.options: dict[str, Options] = {}

    @classmethod
    def from_base(cls, base_layer: nn.Module, routing: Routing) -> AdaptedModule:
        """Wrap a module; its parameters are not copied."""
        return cls(base_layer, routing)

    @property
    def d_in(self) -> int:
        """Columns of W as the factors see it."""
        raise NotImplementedError

    @property
    def d_out(self) -> int:
        """Rows of W as the factors see it."""
        raise NotImplementedError

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where the factors belong, and the dtype that the frozen module computes in."""
        return self.weight.device, self.weight.dtype

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """PEFT's shapes of lora_A and lora_B."""
        return (rank, self.d_in), (self.d_out, rank)

    def add(self, name: str, lora_A: Tensor, lora_B: Tensor, *, alpha: float, options: Options | None = None) -> None:
        """Give the layer one more adapter, with factors of `factor_shapes`. `AdapterStateError` if they do not fit."""
        options, rank = options or Options(), self._rank_of(lora_A)
        if (tuple(lora_A.shape), tuple(lora_B.shape)) != self.factor_shapes(rank):
            raise AdapterStateError(
                f"factors {tuple(lora_A.shape)} and {tuple(lora_B.shape)} do not fit a {self.d_out}×{self.d_in} layer"
            )
        self.check_options(options)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(lora_A), nn.Parameter(lora_B)
        if options.changes_base:
            self.lora_A_start[name] = nn.Parameter(lora_A.clone(), requires_grad=False)
            self.lora_B_start[name] = nn.Parameter(lora_B.clone(), requires_grad=False)
        self.rank[name], self.alpha[name], self.options[name] = rank, alpha, options
        self.scaling[name] = math.scaling(rank, alpha, options.rslora)
        if options.dropout:
            self.lora_dropout[name] = nn.Dropout(options.dropout).train(self.training)
        if options.lora_bias:
            self.lora_bias[name] = nn.Parameter(lora_B.new_zeros(self.d_out))
        if options.dora:
            self.lora_magnitude_vector[name] = nn.Parameter(self.start_magnitude(name))

    def _rank_of(self, lora_A: Tensor) -> int:
        return lora_A.shape[0]

    def check_options(self, options: Options) -> None:
        """Raise `AdapterStateError` for options that this kind of layer does not have."""
        for option in ("dora", "lora_bias"):
            if getattr(options, option) and not self.supports(option):
                raise AdapterStateError(f"{option} is not defined for {type(self.base_layer).__name__} modules")

    def supports(self, option: str) -> bool:
        """Whether "dora" or "lora_bias" is defined for this kind of layer."""
        return False

    def start_magnitude(self, name: str) -> Tensor:
        """DoRA's m at the start: the norms of W + s·B·A, so that the adapted weight is W + s·B·A."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Drop an adapter's factors."""
        for table in self.tables():
            if name in table:
                del table[name]

    def tables(self) -> list[MutableMapping[str, Any]]:
        """All that is kept here by adapter name."""
        names = (*TABLES, "lora_A_start", "lora_B_start", "lora_dropout", "rank", "alpha", "scaling", "options")
        return [getattr(self, name) for name in names]

    def rename(self, name: str, new: str) -> None:
        """Keep an adapter's factors under another name."""
        for table in self.tables():
            if name in table:
                table[new] = table.pop(name)

    def trained(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's trained parameters here, by table name (`TABLES`)."""
        return {table: getattr(self, table)[name] for table in TABLES if name in getattr(self, table)}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The factors that act: (A, B), or ([A; A₀], [B, −B₀]) over an initialisation that changes the base."""
        lora_A, lora_B = self.lora_A[name], self.lora_B[name]
        if name not in self.lora_A_start:
            return lora_A, lora_B
        return torch.cat([lora_A, self.lora_A_start[name]]), torch.cat([lora_B, -self.lora_B_start[name]], dim=1)

    def active(self) -> list[tuple[str, float]]:
        """The active adapters that this layer has, with their weights."""
        return [(name, weight) for name, weight in self.routing.stack.items() if name in self.lora_A]

    def _by_range(self, x: Tensor, y: Tensor, update: Callable[[str, Tensor, Tensor], Tensor], dim: int) -> Tensor:
        """y with `update(name, its part of x, its part of y)` added on each adapter's own tokens, along `dim`."""
        ranges = self.routing.ranges
        self._check_tokens(x, dim)
        parts = []
        for name, (start, end) in ranges.bounds.items():
            if start < end:
                xn, yn = x.narrow(dim, start, end - start), y.narrow(-2, start, end - start)
                parts.append((yn + update(name, xn, yn)).to(y.dtype) if name in self.lora_A else yn)
        return torch.cat(parts, dim=-2)

    def _check_tokens(self, x: Tensor, dim: int) -> None:
        lead = x.shape[: dim + x.ndim]
        if x.shape[dim] != self.routing.ranges.tokens or any(size != 1 for size in lead):
            raise AdapterStateError(
                f"{self.routing.ranges.tokens} tokens are routed, but {type(self.base_layer).__name__} gets {tuple(x.shape)}"
            )

    def _drops(self, name: str) -> bool:
        return name in self.lora_dropout and self.lora_dropout[name].training and self.lora_dropout[name].p > 0

    def _drop(self, name: str, x: Tensor) -> Tensor:
        """x with the adapter's dropout."""
        return self.lora_dropout[name](x) if self._drops(name) else x

    def delta(self, name: str) -> Tensor:
        """ΔW of one adapter in float32, in the shape of the frozen weight as `weight_of` gives it."""
        raise NotImplementedError

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        """A new module holding W + Σ w_n ΔW_n, added in float32 and rounded once; the layer is not changed.

        Raises `AdapterStateError` where the result cannot be held by such a module.
        """
        raise NotImplementedError

    def _mine(self, weights: Mapping[str, float]) -> Iterator[tuple[str, float]]:
        """The given adapters that this layer has; `AdapterStateError` for one that cannot be merged."""
        for name, weight in weights.items():
            if name in self.lora_A:
                if name in self.routing.tokens:
                    raise AdapterStateError(f"adapter {name!r} acts on part of the tokens (aLoRA): it cannot be merged")
                yield name, weight

    # Code around the layer reads these as if it were the module itself.
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank {rank}" for name, rank in self.rank.items())


def clone_module(module: nn.Module, **parameters: Tensor | None) -> nn.Module:
    """A shallow copy of a module with some parameters replaced (None: the module has none); the rest is shared.

    The new parameters are frozen unless the old ones were trained.
    """
    new = module.__class__.__new__(module.__class__)
    new.__dict__ = module.__dict__ | {
        key: dict(module.__dict__[key]) for key in ("_parameters", "_buffers", "_modules") if key in module.__dict__
    }
    for name, value in parameters.items():
        old = module._parameters.get(name)
        trained = old is not None and old.requires_grad
        new._parameters[name] = None if value is None else nn.Parameter(value, requires_grad=trained)
    return new


def plain(module: nn.Module) -> nn.Module:
    """The base's own module under the adapted ones that stand in its place."""
    while isinstance(module, AdaptedModule):
        module = module.base_layer
    return module

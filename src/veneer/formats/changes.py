"""What an adapter does to each weight of a checkpoint, so that the sum can be formed a few rows at a time.

Whatever the layer, the weight as it is stored becomes W + L·R: a linear has L = s·B and R = A, a weight that is stored
transposed (Conv1D, embeddings, some experts) L = s·Aᵀ and R = Bᵀ. With DoRA (arXiv:2402.09353, eq. 5) it is c∘(W + L·R)
with c = m/‖W + L·R‖ over d_in: by rows of a linear, by columns of a transposed weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.attach import get_bank
from veneer.adapter.frozen import is_conv1d
from veneer.adapter.layers import (
    AdaptedAttention,
    AdaptedConv,
    AdaptedEmbedding,
    ParameterFactors,
    TiedHead,
    TrainedTokensHead,
    TrainedTokensTwin,
    plain,
)
from veneer.adapter.math import wide
from veneer.adapter.targets import base_parameters, plain_name
from veneer.errors import AdapterStateError

BLOCK = 1 << 18
"""Elements summed at once: 1 MB of float32, which stays in a core's own cache (4 times as much: 3 times as slow)."""
Round = Callable[[Tensor, int, Tensor], Tensor]
"""(float32 block, its number, where to put it in the dtype that is written) → the latter."""


@dataclass
class Change:
    """How one stored weight changes; shapes are those of `as_matrices(W)`: (E, m, n), E = 1 but for fused experts.

    left (E, m, r) and right (E, r, n) float32 or None; magnitude (m) or (n) if `by_column`; `whole` replaces W, `added`
    is added to it, and `rows` replaces rows of it by number.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    magnitude: Tensor | None = None
    by_column: bool = False
    whole: Tensor | None = None
    added: Tensor | None = None
    rows: dict[int, Tensor] = field(default_factory=dict)


def as_matrices(weight: Tensor) -> Tensor:
    """A weight as (E, m, n): experts as they are, a convolution's kernels flattened, a vector as one row."""
    if weight.ndim == 3:
        return weight
    return (weight.flatten(1) if weight.ndim > 1 else weight.reshape(1, -1)).unsqueeze(0)


def changes_of(model: nn.Module, name: str, magnitudes: dict[str, Tensor] | None = None) -> dict[str, Change]:
    """Parameter name → how the adapter `name` on the model changes it, weights that share a name at each of its places.

    `magnitudes` are DoRA's m by target: the adapter on the model is without them, which spares reading the base.
    Raises `AdapterStateError` for what cannot be merged.
    """
    bank, found = get_bank(model), {}
    entry = bank.check(name)
    if entry.config.invocation:
        raise AdapterStateError("the adapter acts on part of the tokens (aLoRA): it cannot be merged")
    for path in entry.targets:
        layer = bank.layers[path]
        key, change = _low_rank(path, layer, name)
        m = (magnitudes or {}).get(path)
        found[key] = change if m is None else replace(change, magnitude=wide(m).flatten())
        if name in layer.lora_bias:
            found[f"{path}.bias"] = Change(added=layer.scaling[name] * wide(layer.lora_bias[name].detach()))
    for path, module in model.named_modules():
        if isinstance(module, TiedHead) and name in module.names:
            source = next(p for p, layer in bank.layers.items() if layer is module.source)
            found[f"{plain_name(path)}.weight"] = found[f"{source}.weight"]
    for path in entry.tokens:
        layer = bank.tokens[path]
        change = Change(rows=dict(zip(layer.indices[name], layer.lora_rows[name].detach())))
        for place, module in model.named_modules():
            twin = isinstance(module, (TrainedTokensHead, TrainedTokensTwin)) and module.source is layer
            if module is layer or twin:
                found[f"{plain_name(place)}.weight"] = change
    whole = {f"{p}.{k}": v for p, module in entry.modules.items() for k, v in module.named_parameters()} | entry.biases
    for key, value in whole.items():
        found[key] = replace(found.get(key, Change()), whole=value.detach())
    return found


def _low_rank(path: str, layer: Any, name: str) -> tuple[str, Change]:
    """(parameter name, its L and R) of one adapted layer."""
    lora_A, lora_B = (wide(f.detach()) for f in layer.factors(name))
    base, s = plain(layer), layer.scaling[name]
    if isinstance(layer, ParameterFactors):
        lora_A, lora_B = (wide(f.detach()) for f in layer.by_expert(name))  # (E, r, d_in), (E, d_out, r)
        if layer.transposed:
            return path, Change(s * lora_A.transpose(1, 2), lora_B.transpose(1, 2).contiguous(), by_column=True)
        return path, Change(s * lora_B, lora_A)
    if isinstance(layer, AdaptedConv):
        if base.groups > 1:
            raise AdapterStateError(
                f"{path}: an adapter on a grouped convolution mixes the groups: it cannot be merged"
            )
        lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
    key = f"{path}.in_proj_weight" if isinstance(layer, AdaptedAttention) else f"{path}.weight"
    if isinstance(layer, AdaptedEmbedding) or is_conv1d(base):
        return key, Change(s * lora_A.t()[None], lora_B.t()[None].contiguous(), by_column=True)
    return key, Change(s * lora_B[None], lora_A[None])


def spans(matrices: Tensor) -> list[tuple[int, int, int]]:
    """The blocks (expert, first row, last row + 1) of `as_matrices(W)`, in the order in which they are stored."""
    step = max(1, BLOCK // max(1, matrices.shape[2]))
    starts = range(0, matrices.shape[1], step)
    return [(e, start, min(start + step, matrices.shape[1])) for e in range(len(matrices)) for start in starts]


def sum_dtype(weight: Tensor) -> torch.dtype:
    """What sums with a weight are made in: at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def changed_rows(
    matrices: Tensor, change: Change, span: tuple[int, int, int], norm: Tensor | None, memory: Tensor | None = None
) -> Tensor:
    """A block of the changed weight in float32 (or wider), (k, n); `norm` is that of `column_norm` where there is one.

    `memory`, a flat tensor of that dtype and at least k·n elements, holds the result: the system need not find any anew.
    """
    e, start, stop = span
    total = _sum(matrices[e], change, e, start, stop, memory)
    if change.magnitude is not None:
        if norm is None:
            size = torch.linalg.vector_norm(total, dim=1, keepdim=True)
            total *= change.magnitude[start:stop, None] / size
        else:
            total *= change.magnitude / norm
    for row, value in change.rows.items():
        if start <= row < stop:
            total[row - start] = value
    return total


def _sum(
    matrix: Tensor,
    change: Change,
    e: int,
    start: int,
    stop: int,
    memory: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of W + L·R (+ a bias's own part) in `dtype`, `memory`'s, or float32 (or wider)."""
    rows = matrix[start:stop]
    if memory is None:
        memory = torch.empty(rows.numel(), dtype=dtype or sum_dtype(matrix))
    total = memory[: rows.numel()].view(rows.shape).copy_(rows)
    if change.left is not None:
        total.addmm_(change.left[e, start:stop].to(total.dtype), change.right[e].to(total.dtype))
    return total if change.added is None else total.add_(change.added)


def column_norm(matrices: Tensor, change: Change, e: int, dtype: torch.dtype | None = None) -> Tensor | None:
    """‖W + L·R‖ of each column where a magnitude asks for it, which needs a pass over all rows before the first is done.

    In `dtype`; absent: in float32 (or wider).
    """
    if change.magnitude is None or not change.by_column:
        return None
    mine = [span for span in spans(matrices) if span[0] == e]
    return sum(_sum(matrices[e], change, *span, dtype=dtype).square_().sum(0) for span in mine).sqrt()


def reference_row(weight: Tensor, change: Change, e: int, row: int) -> Tensor:
    """One row of the changed weight in float64 by the definition: what a written file is checked against."""
    if row in change.rows:
        return change.rows[row].double()
    matrices = as_matrices(weight if change.whole is None else change.whole)
    total = matrices[e, row].double()
    if change.left is not None:
        total = total + change.left[e, row].double() @ change.right[e].double()
    if change.added is not None:
        total = total + change.added.double()
    if change.magnitude is None:
        return total
    if change.by_column:
        return total * (change.magnitude.double() / column_norm(matrices, change, e, torch.float64))
    return total * (change.magnitude[row].double() / total.norm())


def by_place(model: nn.Module) -> dict[int, list[str]]:
    """Each parameter of the base (by id) → its names: several where weights are tied."""
    places: dict[int, list[str]] = {}
    for name, parameter in base_parameters(model).items():
        places.setdefault(id(parameter), []).append(name)
    return places

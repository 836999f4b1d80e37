"""Which base a model is: its architecture, shapes and a sample of its weights, whatever dtype it is loaded in.

A quantised base has the fingerprint of the float one but for the weights that quantisation changed, which are left out
of the comparison; embeddings, norms, biases and the output head are what tells it from another model.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import quantised
from veneer.adapter.frozen import is_quantised
from veneer.adapter.targets import output_head

SAMPLES = 256
ANCHORS = 32
"""Values of each embedding and of the head; of norms and biases, which are small and many, two."""
TOLERANCE = 0.02
"""float16, bfloat16 and float32 casts of one weight agree within 2^-8; two trained models do not agree at all."""

Places = dict[str, tuple[tuple[int, ...], Tensor | None]]


@dataclass(frozen=True)
class Fingerprint:
    """`shapes` is a hash over names and shapes; `samples` are matrices' values at fixed places, None where quantised.

    `anchors` are values of the parameters that quantisation leaves alone, by name.
    """

    architecture: str
    model_type: str | None
    parameters: int
    shapes: str
    samples: list[float | None]
    anchors: dict[str, list[float]] | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fingerprint:
        """From what `as_dict` gave, or an earlier version of it."""
        return cls(**{key: values.get(key) for key in cls.__dataclass_fields__})


def base_weights(model: nn.Module) -> Places:
    """The base's matrices by name: logical shape, and the weight or None where it is quantised.

    The same with and without adapters, and the same names and shapes for a float base and a quantised one.
    """
    found: Places = {}
    inside = []
    for name, module in model.named_modules():
        if is_quantised(module):
            shape = quantised.shape(module)
            was_transposed = getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"
            found[f"{_plain_name(name)}.weight"] = (shape[::-1] if was_transposed else shape, None)
            inside.append(name + ".")
    for name, parameter in _own(model).items():
        if parameter.ndim >= 2 and parameter.is_floating_point() and not name.startswith(tuple(inside)):
            found[_plain_name(name)] = (tuple(parameter.shape), parameter)
    return dict(sorted(found.items()))


def fingerprint(model: nn.Module) -> Fingerprint:
    """Read a few hundred weights spread over all matrices; fast whatever the model's size."""
    weights = base_weights(model)
    shapes = hashlib.sha256(repr([(name, shape) for name, (shape, _) in weights.items()]).encode()).hexdigest()
    each = max(1, SAMPLES // max(1, len(weights)))
    samples: list[float | None] = []
    chosen = list(weights.values())
    for shape, weight in chosen[:: max(1, len(chosen) // SAMPLES)]:
        samples += _values(torch.Size(shape).numel(), weight, each)
    config = getattr(model, "config", None)
    return Fingerprint(
        architecture=re.sub(r"^FSDP", "", type(model).__name__),
        model_type=getattr(config, "model_type", None),
        parameters=sum(torch.Size(shape).numel() for shape, _ in weights.values()),
        shapes=shapes,
        samples=samples,
        anchors=_anchors(model),
    )


def mismatch(mine: Fingerprint, theirs: Fingerprint) -> str | None:
    """Why two fingerprints are not of one base, in a few words; None if they are. What one side lacks is not compared."""
    if mine.architecture != theirs.architecture:
        return f"this one is a {mine.architecture}, that one a {theirs.architecture}"
    if mine.shapes != theirs.shapes:
        return f"the shapes differ ({mine.parameters:,} weights here, {theirs.parameters:,} there)"
    if len(mine.samples) != len(theirs.samples):
        return "the weights were sampled differently"
    wrong, count = _differing([(a, b) for a, b in zip(mine.samples, theirs.samples) if None not in (a, b)])
    for name in (mine.anchors or {}).keys() & (theirs.anchors or {}).keys():
        more = _differing(list(zip(mine.anchors[name], theirs.anchors[name])))
        wrong, count = wrong + more[0], count + more[1]
    return f"same shapes, other weights ({wrong} of {count} sampled differ)" if wrong else None


def _differing(pairs: list[tuple[float, float]]) -> tuple[int, int]:
    if not pairs:
        return 0, 0
    a, b = torch.tensor(pairs).unbind(1)
    close = torch.isclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().mean()))
    return int((~close).sum()), len(pairs)


def _anchors(model: nn.Module) -> dict[str, list[float]]:
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head = output_head(model)
    if head is not None and not is_quantised(head):
        tables.append(head.weight)
    large = {id(weight) for weight in tables}
    found = {}
    small = []
    for name, parameter in _own(model).items():
        if parameter.is_meta:
            continue
        if id(parameter) in large:
            found[_plain_name(name)] = _values(parameter.numel(), parameter, ANCHORS)
        elif parameter.ndim == 1 and parameter.is_floating_point():
            small.append((_plain_name(name), parameter))
    for name, parameter in small[:: max(1, len(small) // SAMPLES)]:
        found[name] = _values(parameter.numel(), parameter, 2)
    return found


@torch.no_grad()
def _values(numel: int, weight: Tensor | None, each: int) -> list[float | None]:
    """Values at fixed places of a flattened weight; as many None if there is no float weight."""
    step = max(1, numel // (each + 1))
    places = range(step // 2, numel, step)[:each]
    if weight is None or weight.is_meta:  # quantised, or not held by the model
        return [None] * len(places)
    taken = weight.detach().reshape(-1)[step // 2 :: step][:each].float().cpu()
    return [float(f"{value:.4g}") for value in taken.tolist()]


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters, without those of adapters."""
    return {name: p for name, p in model.named_parameters() if ".lora_" not in name}


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "")

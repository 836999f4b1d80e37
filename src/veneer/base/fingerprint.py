"""Which base a model is: its architecture, shapes and a sample of its weights, whatever dtype it is loaded in."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 256
TOLERANCE = 0.02
"""float16, bfloat16 and float32 casts of one weight agree within 2^-8; two trained models do not agree at all."""


@dataclass(frozen=True)
class Fingerprint:
    """`shapes` is a hash over names and shapes; `samples` are weights at fixed places."""

    architecture: str
    model_type: str | None
    parameters: int
    shapes: str
    samples: list[float]

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fingerprint:
        """From what `as_dict` gave."""
        return cls(**{key: values.get(key) for key in cls.__dataclass_fields__})


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's own matrices by name, the same with and without adapters on it. Packed weights are left out."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if parameter.ndim >= 2 and parameter.is_floating_point():
            found[name.replace(".base_layer.", ".")] = parameter
    return dict(sorted(found.items()))


def fingerprint(model: nn.Module) -> Fingerprint:
    """Read a few hundred weights spread over all matrices; fast whatever the model's size."""
    weights = base_weights(model)
    shapes = hashlib.sha256(repr([(n, tuple(w.shape)) for n, w in weights.items()]).encode()).hexdigest()
    each = max(1, SAMPLES // max(1, len(weights)))
    samples: list[float] = []
    chosen = list(weights.values())
    chosen = chosen[:: max(1, len(chosen) // SAMPLES)]
    with torch.no_grad():
        for weight in chosen:
            flat = weight.detach().reshape(-1)
            step = max(1, flat.numel() // (each + 1))
            samples += flat[step // 2 :: step][:each].float().cpu().tolist()
    config = getattr(model, "config", None)
    return Fingerprint(
        architecture=re.sub(r"^FSDP", "", type(model).__name__),
        model_type=getattr(config, "model_type", None),
        parameters=sum(w.numel() for w in weights.values()),
        shapes=shapes,
        samples=[float(f"{v:.4g}") for v in samples],
    )


def mismatch(mine: Fingerprint, theirs: Fingerprint) -> str | None:
    """Why two fingerprints are not of one base, in a few words; None if they are."""
    if mine.architecture != theirs.architecture:
        return f"this one is a {mine.architecture}, that one a {theirs.architecture}"
    if mine.shapes != theirs.shapes:
        return f"the shapes differ ({mine.parameters:,} weights here, {theirs.parameters:,} there)"
    a, b = torch.tensor(mine.samples), torch.tensor(theirs.samples)
    if a.shape != b.shape:
        return "the weights were sampled differently"
    spread = float(b.abs().mean()) if b.numel() else 0.0
    wrong = int((~torch.isclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * spread)).sum())
    return f"same shapes, other weights ({wrong} of {a.numel()} sampled differ)" if wrong else None

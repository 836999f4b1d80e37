"""Put one adapter through PEFT and Veneer in both directions and measure how far their answers differ.

Every comparison is a relative error, max|a − b| / max|b| over whole tensors, with PEFT as b. Gradients are compared in
the file's layout: both libraries save the gradients in place of the values, so the file's keys are the name map.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from conformance.models import Architecture, loss_of, scores_of
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from veneer.errors import VeneerError

TOLERANCE = 2e-5
"""Largest relative error of float32 results that counts as the same."""
FIELDS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "bias",
    "lora_bias",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "init_lora_weights",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "task_type",
    "peft_type",
)
"""Fields of adapter_config.json that must mean the same in both files."""


class NotInPeft(Exception):
    """The combination does not exist in PEFT, or not for this architecture."""


class Refused(Exception):
    """Veneer refuses the combination, with a reason."""


class PeftIsWrong(Exception):
    """PEFT's result is wrong, and Veneer's is what the definition says."""


class Differs(AssertionError):
    """The two libraries disagree."""


def relative(mine: Tensor, theirs: Tensor, floor: float = 1e-12) -> float:
    """max|mine − theirs| / max(max|theirs|, floor); infinite where the shapes differ or a value is not finite."""
    if mine.shape != theirs.shape or not (mine.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    distance = (mine.double() - theirs.double()).abs().max()
    return (distance / theirs.double().abs().max().clamp_min(floor)).item()


class Errors:
    """The largest relative error so far; `add` raises `Differs` above the tolerance."""

    def __init__(self) -> None:
        self.largest = 0.0

    def add(self, what: str, mine: Tensor, theirs: Tensor, tolerance: float = TOLERANCE, floor: float = 1e-12) -> None:
        error = relative(mine.detach(), theirs.detach(), floor)
        if not error <= tolerance:
            raise Differs(f"{what} differs by {error:.1e} (shapes {tuple(mine.shape)}, {tuple(theirs.shape)})")
        self.largest = max(self.largest, error)

    def add_all(self, what: str, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        if mine.keys() != theirs.keys():
            raise Differs(f"{what}: keys differ, first {sorted(mine.keys() ^ theirs.keys())[0]}")
        # A gradient that is small beside the others is mostly rounding: it is measured against a thousandth of theirs.
        floor = 1e-3 * max((t.abs().max().item() for t in theirs.values()), default=0.0)
        for key, value in theirs.items():
            self.add(f"{what} of {key}", mine[key], value, floor=max(floor, 1e-12))


@contextmanager
def quiet():
    """PEFT and transformers without their warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_peft(architecture: Architecture, options: dict, name: str = "default") -> nn.Module:
    """PEFT's model with a new adapter; `NotInPeft` where PEFT raises."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 6, "task_type": architecture.task} | copy.deepcopy(options)  # PEFT adds to lists
    options = {"modules_to_save": list(architecture.heads)} | options
    if architecture.targets:
        options = {"target_modules": list(architecture.targets)} | options
    try:
        with quiet():
            return get_peft_model(architecture.model(), LoraConfig(**options), adapter_name=name)
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise NotInPeft(first_line(error)) from None


def load_in_veneer(architecture: Architecture, path: Path, **options) -> nn.Module:
    """The base with the adapter in Veneer; `Refused` where Veneer says no."""
    model = architecture.model()
    try:
        veneer.load_adapter(model, path, **options)
    except VeneerError as error:
        raise Refused(first_line(error).replace(f"{path}: ", "").replace(str(path), "adapter")) from None
    return model


def load_in_peft(architecture: Architecture, path: Path) -> nn.Module:
    """The base with the adapter in PEFT, which must find every tensor that it expects and no other."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(architecture.model(), path, is_trainable=True)
    lost = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if lost:
        raise Differs(f"PEFT misses tensors in Veneer's file: {lost[0][:200]}")
    return model.eval()


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def randomise(model: nn.Module, seed: int = 0) -> None:
    """`randomise_parameters` for everything in a model that is trained."""
    randomise_parameters({key: p for key, p in model.named_parameters() if p.requires_grad}, seed)


def randomise_parameters(parameters: dict[str, nn.Parameter], seed: int = 0) -> None:
    """Values that show up in every result: as after a long training, not the ΔW = 0 of the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in key:
                parameter.mul_(1 + 0.2 * noise.abs())
            elif "lora_" in key and "bias" not in key:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.1 * noise)


def nudge(parameters: Iterable[nn.Parameter]) -> None:
    """A few training steps' worth of change."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def answer(model: nn.Module, batch: dict[str, Tensor], backward: bool = False) -> tuple[Tensor, Tensor]:
    """Scores and loss; with `backward`, fresh gradients too."""
    model.eval()
    if not backward:
        with torch.no_grad():
            outputs = model(**batch)
        return scores_of(outputs), loss_of(outputs)
    model.zero_grad(set_to_none=True)
    outputs = model(**batch)
    loss = loss_of(outputs)
    loss.backward()
    return scores_of(outputs).detach(), loss.detach()


def tensors_of(path: Path, base: nn.Module) -> dict[str, Tensor]:
    """An adapter file's tensors, without what PEFT writes besides: frozen weights of the base, and second copies."""
    own, tensors = base.state_dict(), load_file(path / "adapter_model.safetensors")

    def is_redundant(key: str, value: Tensor) -> bool:
        plain = re.sub(r"\.(base_layer|original_module|modules_to_save)\.", ".", key)
        frozen = own.get(plain.removeprefix("base_model.model."))
        return plain != key and any(t is not None and torch.equal(t, value) for t in (frozen, tensors.get(plain)))

    return {key: value for key, value in tensors.items() if not is_redundant(key, value)}


def gradients(parameters: list[nn.Parameter], save, path: Path, base: nn.Module) -> dict[str, Tensor]:
    """Gradients under the file's keys: saving is affine, f(v) = L v + c, so L·grad = f(grad) − f(0)."""
    kept = [parameter.detach().clone() for parameter in parameters]
    slopes = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    written = []
    for step, values in enumerate(([torch.zeros_like(p) for p in kept], slopes)):
        with torch.no_grad():
            for parameter, value in zip(parameters, values):
                parameter.copy_(value)
        with quiet():
            save(path / str(step))
        written.append(tensors_of(path / str(step), base))
    with torch.no_grad():
        for parameter, value in zip(parameters, kept):
            parameter.copy_(value)
    return {key: value - written[0][key] for key, value in written[1].items()}


def peft_gradients(model: nn.Module, path: Path, base: nn.Module) -> dict[str, Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return gradients(trained, model.save_pretrained, path / "peft-gradients", base)


def veneer_gradients(model: nn.Module, path: Path, base: nn.Module, name: str = "default") -> dict[str, Tensor]:
    trained = list(veneer.get_bank(model).parameters(name).values())

    def save(folder):
        veneer.save_adapter(model, folder, name=name)

    return gradients(trained, save, path / "veneer-gradients", base)


def compare_files(mine: Path, theirs: Path, base: nn.Module) -> None:
    """The same tensors (keys, shapes, dtypes, bits) and the same meaning of the fields."""
    a, b = tensors_of(mine, base), tensors_of(theirs, base)
    if a.keys() != b.keys():
        raise Differs(f"file: keys differ, first {sorted(a.keys() ^ b.keys())[0]}")
    for key in b:
        if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key]):
            raise Differs(f"file: {key} is {a[key].dtype} {tuple(a[key].shape)}, not the same as PEFT's")
    compare_configs(mine, theirs, base)


def compare_configs(mine: Path, theirs: Path, base: nn.Module) -> None:
    a, b = (json.loads((path / "adapter_config.json").read_text()) for path in (mine, theirs))
    ends = {part for name, _ in base.named_modules() for part in (name, name.rsplit(".", 1)[-1])}
    parts = [*(name for name, _ in base.named_modules()), *(name for name, _ in base.named_parameters())]

    def whole(names):
        """The full names that endings mean."""
        return {entry: [p for p in parts if p == entry or p.endswith(f".{entry}")] for entry in names or ()}

    for fields in (a, b):
        named = whole(fields.get("target_parameters"))
        fields["target_parameters"] = sorted({name for names in named.values() for name in names})
        if isinstance(tokens := fields.get("trainable_token_indices"), dict):
            named = whole(tokens)
            fields["trainable_token_indices"] = {name: ids for key, ids in tokens.items() for name in named[key]}
    for fields in (a, b):  # PEFT adds both names that a head may have, "classifier" and "score"
        fields["modules_to_save"] = sorted({name for name in fields.get("modules_to_save") or [] if name in ends})
    for field in FIELDS:
        if _plain(a.get(field)) != _plain(b.get(field)):
            raise Differs(f"adapter_config.json: {field} is {a.get(field)!r}, PEFT writes {b.get(field)!r}")


def _plain(value):
    """Absent, null, empty and false mean the same; a list of names is a set."""
    if isinstance(value, list):
        value = sorted(value)
    return value or None

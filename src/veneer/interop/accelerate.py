"""accelerate, decelerate: a live PEFT model computes its LoRA layers with Veneer, and stays the PEFT model it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from veneer.errors import AdapterStateError
from veneer.interop.accelerated import AcceleratedForward, accelerated, is_covered


@dataclass(frozen=True)
class AccelerateReport:
    """Names of the PEFT layers that are accelerated, and of those that are not with the reason."""

    accelerated: tuple[str, ...]
    plain: dict[str, str]

    def __str__(self) -> str:
        total = len(self.accelerated) + len(self.plain)
        reasons = "".join(f"; {count} not: {why}" for why, count in Counter(self.plain.values()).most_common())
        return f"{len(self.accelerated)} of {total} PEFT layers accelerated{reasons}"


def accelerate(model: nn.Module) -> AccelerateReport:
    """Make the LoRA layers of a live PEFT model compute as Veneer's do, in place.

    Works on a `PeftModel`, and on any model that holds PEFT's LoRA layers (transformers' `add_adapter`, diffusers).
    Each layer object gets a subclass of its own class that changes `forward` and nothing else: names, parameters,
    state dict, hooks, optimisers, saving, adding, switching, merging and deleting adapters stay PEFT's. Layers that
    PEFT makes later, for modules that had none before, are plain until the next call; a second call changes nothing
    else. Raises `AdapterStateError` if there is no PEFT layer in the model.
    """
    layers = {name: module for name, module in model.named_modules() if _is_peft_layer(module)}
    if not layers:
        raise AdapterStateError(
            "no PEFT layer in this model: accelerate works on peft.get_peft_model(…)'s result; "
            "a plain model is adapted by veneer.attach(model, config)"
        )
    plain = {name: why for name, layer in layers.items() if (why := _why_not(layer))}
    for name, layer in layers.items():
        if name not in plain and not isinstance(layer, AcceleratedForward):
            layer.__class__ = accelerated(type(layer))
    return AccelerateReport(tuple(name for name in layers if name not in plain), plain)


def decelerate(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: each layer gets PEFT's own class back. Returns the model."""
    for module in model.modules():
        if isinstance(module, AcceleratedForward):
            module.__class__ = module.peft_class
    return model


def _is_peft_layer(module: nn.Module) -> bool:
    """Recognised by name: PEFT need not be installed."""
    return any(k.__name__ == "BaseTunerLayer" and k.__module__.startswith("peft.") for k in type(module).__mro__)


def _why_not(layer: nn.Module) -> str | None:
    if isinstance(layer, AcceleratedForward):
        return None
    kind = type(layer)
    if accelerated(kind) is None:
        return f"{kind.__module__.rpartition('.')[0].removeprefix('peft.tuners.')}.{kind.__name__} is not covered"
    if "forward" in layer.__dict__:
        return "another library replaced the layer's forward"
    names = list(layer.lora_A)
    if not names:
        return "no adapter on the layer"
    if not any(is_covered(layer.lora_variant.get(name)) for name in names):
        return f"{type(layer.lora_variant[names[0]]).__name__} is not covered"
    return "lora_bias is not covered" if all(layer.lora_bias.get(name) for name in names) else None

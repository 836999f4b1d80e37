"""What an adapted transformers model answers for itself while Veneer's layers are in it.

`PreTrainedModel.save_pretrained` would write the base's weights under `….base_layer.weight`, which nothing loads. An
adapted model gets a `save_pretrained` of its own, on the object and not on the class, that writes the adapter: this is
what transformers' Trainer, TRL and a user's own code call.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from veneer.adapter.layers import AdaptedModule
from veneer.adapter.targets import output_head
from veneer.errors import AdapterStateError

if TYPE_CHECKING:
    from veneer.adapter.bank import Bank

HARMLESS = {"safe_serialization", "max_shard_size", "save_peft_format", "save_function", "token"}
"""Options without which nothing is lost."""
CHECKPOINT = re.compile(r"checkpoint-\d+")  # how Trainer names the directories that it resumes from


def claim(bank: Bank) -> None:
    """Give a freshly adapted transformers model its own `save_pretrained`, and tell transformers of the adapters.

    The flag is transformers' own for "adapters are on this model": Trainer then takes a quantised base, and gradient
    checkpointing makes the inputs require gradients. What TRL's trainers cannot do is refused before each call. `detach`
    and `merge` undo all of it.
    """
    model = bank.model
    if hasattr(model, "save_pretrained"):
        # No bound method: unpickling would bind the class's own one.
        model.__dict__ |= {"save_pretrained": partial(save_pretrained, model), "_hf_peft_config_loaded": True}
        for key in ("save_pretrained", "_hf_peft_config_loaded"):
            bank.undo.append(partial(delattr, model, key))
        bank.undo.append(model.register_forward_pre_hook(refuse_fused_head, with_kwargs=True).remove)


def refuse_fused_head(model: nn.Module, args: tuple, options: dict[str, Any]) -> None:
    """Before a call: raise `AdapterStateError` where TRL would compute the loss from the weight of an adapted head.

    TRL's trainers replace `forward` and take lm_head.weight, past the layer: an adapter there would neither act nor learn.
    """
    head = output_head(model) if options.get("fused_lm_head") else None
    if isinstance(head, AdaptedModule) and head.active():
        raise AdapterStateError(
            "the output head is adapted, and TRL computes the loss from its weight alone: leave it out (exclude_modules; for "
            "a tied embedding tied_head: embedding and no trainable_tokens), or train it whole (modules_to_save)"
        )


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Write the adapters of an adapted model in PEFT's format, in place of the whole model.

    As PEFT does it: "default" in the directory itself, each other one in a directory of its name; a single adapter of
    any name in the directory itself; other files there stay. In one of Trainer's checkpoint directories also
    model.safetensors with the trained parameters under the live model's names, which is what Trainer resumes from.
    `state_dict` is what Accelerate's users pass: the model's own. Raises `AdapterStateError` for another one, and for an
    option that would have to be ignored.
    """
    import veneer  # the formats are above this layer; this is a user's call of the public function

    asked = sorted(key for key, value in options.items() if value and key not in HARMLESS)
    if asked:
        raise AdapterStateError(
            f"save_pretrained({asked[0]}=…) does not work on an adapted model, of which it writes the adapter alone: "
            f"leave it out, or merge the adapter first (veneer.merge) and save the whole model"
        )
    if not is_main_process:
        return
    bank, folder = veneer.get_bank(model), Path(save_directory)
    if not bank.names:
        raise AdapterStateError(
            "no adapter is left to save: veneer.detach(model) gives the base its save_pretrained back"
        )
    own_state = trained_state(bank) if state_dict or CHECKPOINT.fullmatch(folder.name) else {}
    if state_dict and not all(k in state_dict and torch.equal(v, state_dict[k].cpu()) for k, v in own_state.items()):
        raise AdapterStateError(
            "save_pretrained(state_dict=…) got other values than the model's, which it writes: load them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in bank.names:
        own = folder if name == "default" or len(bank.names) == 1 else folder / name
        own.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=folder) as temporary:
            for file in veneer.save_adapter(model, Path(temporary) / name, name=name).iterdir():
                os.replace(file, own / file.name)
    if CHECKPOINT.fullmatch(folder.name):
        save_file(own_state, folder / "model.safetensors", metadata={"format": "pt"})


def trained_state(bank: Bank) -> dict[str, Tensor]:
    """What training may change, under the live model's names: all in the adapted layers but the base, and what trains.

    The names and values are `model.state_dict()`'s, so that `model.load_state_dict(…, strict=False)` takes them back.
    """
    layers = {id(layer) for layer in bank.wrappers}
    inside = tuple(f"{path}." for path, module in bank.model.named_modules() if id(module) in layers)
    trains = {path for path, p in bank.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    trains |= {key for name in bank.active for key in bank.buffers(name)}
    return {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in bank.model.state_dict().items()
        if key in trains or (key.startswith(inside) and ".base_layer." not in key)
    }

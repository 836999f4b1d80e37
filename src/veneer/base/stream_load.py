"""Load a base for streaming: block by block into host memory, or left in its files, quantised on the way or not."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from veneer.adapter.blocks import staying
from veneer.adapter.targets import input_embedding, output_head
from veneer.base import quant as quantisation
from veneer.base.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from veneer.base.held import Block, Leaf, hold, leaves_of
from veneer.base.load import BaseInfo, load_base, load_tokenizer, locate, pick_device, pick_dtype
from veneer.base.mapped import map_model
from veneer.base.paths import cache_dir
from veneer.base.quiet import quiet_transformers
from veneer.base.stream import CHUNK_BYTES, SLOTS, StreamedBase, check_streamable, frozen_blocks
from veneer.errors import BaseModelError, ConfigError

BYTES = {"nf4": 0.516, "fp4": 0.516, "int8": 1.002}
"""Bytes of a weight by quantisation, scales included."""


def load_streamed(
    name_or_path: str | Path,
    *,
    where: str = "host",
    dtype: Any = "auto",
    device: str = "auto",
    chat_template: str | Path | None = None,
    quant: str | None = None,
    slots: int = SLOTS,
    resident: int = 0,
) -> tuple[Any, Any]:
    """A frozen causal language model whose blocks stream to `device`, and its tokenizer; see `StreamedBase`.

    where "host": in host memory, in `dtype` or quantised (nf4, fp4, int8) once, block by block. "disk": in the
    safetensors files as they are, cast on the device; what the files do not hold in that form (quantised weights, fused
    experts) is written once to a scratch file in Veneer's cache, which goes when the process ends. `slots` buffers on the
    device are passed through, and `resident` of the blocks stay there. Raises
    `BaseModelError` and `ConfigError` as `load_base` does, and for a model that does not stream.
    """
    place = pick_device(device)
    kind, place = pick_dtype(dtype, place), torch.device(place)
    quant = quantisation.check_quant(quant, str(place), kind)
    if quant not in (None, *BYTES):
        raise ConfigError(f"train.stream goes with quant none, {', '.join(BYTES)}, not {quant}")
    tokenizer = load_tokenizer(name_or_path, chat_template=chat_template)
    source = locate(str(name_or_path)).where
    if stored := quantisation.stored_method(source):
        raise BaseModelError(
            f"{name_or_path} is stored quantised ({stored}), and streaming quantises float weights itself: use its "
            f"original with quant: nf4, or stream: off"
        )
    folder = find_checkpoint(name_or_path)
    if folder is None:  # GGUF: there is no way but through memory
        model, _ = load_base(name_or_path, dtype=kind, device="cpu", chat_template=chat_template)
        files = Files(None, {})
    else:
        checkpoint = open_checkpoint(folder)
        model, keys = map_model(checkpoint, name_or_path)
        files = Files(checkpoint, keys)
        with quiet_transformers():
            fill_buffers(model)
            head = output_head(model)
            if head is not None and head.weight.is_meta:
                model.tie_weights()
    check_streamable(model)
    files.scratch = Scratch() if where == "disk" else None
    stream_model(model, files, place, kind, quant, slots, resident)
    model.requires_grad_(False)
    model.eval()
    model.veneer_base = BaseInfo(str(name_or_path), source, None, quant)
    return model, tokenizer


@dataclass
class Scratch:
    """A file without a name for bytes that the checkpoint does not hold as they are needed."""

    descriptor: int = -1
    size: int = 0

    def write(self, tensor: Tensor) -> tuple[int, Tensor]:
        """Append a tensor's bytes; (their start, the tensor as a view of the file)."""
        data = tensor.detach().cpu().contiguous()
        count = data.numel() * data.element_size()
        if self.descriptor < 0:
            cache_dir().mkdir(parents=True, exist_ok=True)
            self.descriptor, path = tempfile.mkstemp(prefix="stream-", dir=cache_dir())
            os.unlink(path)
        if shutil.disk_usage(cache_dir()).free < count:
            raise BaseModelError(f"{cache_dir()} is full: streaming from disk writes its own form of the weights there")
        start = self.size
        raw = memoryview(data.view(-1).view(torch.uint8).numpy())
        done = 0
        while done < count:
            done += os.pwrite(self.descriptor, raw[done:], start + done)
        self.size = -(-(start + count) // 4096) * 4096
        os.truncate(self.descriptor, self.size)
        with os.fdopen(os.dup(self.descriptor), "rb") as file:
            mapped = np.memmap(file, np.uint8, "c", start, (count,)) if count else np.empty(0, np.uint8)
        return start, torch.from_numpy(mapped).view(data.dtype).view(data.shape)


@dataclass
class Files:
    """Where a mapped model's parameters lie in its checkpoint. With `scratch`, weights stay on disk."""

    checkpoint: Checkpoint | None
    keys: dict[str, str]
    scratch: Scratch | None = None

    def place_of(self, name: str) -> tuple[int, int] | None:
        """(descriptor, start) of a parameter's bytes."""
        if self.checkpoint is None or name not in self.keys:
            return None
        file = self.checkpoint.files[self.checkpoint.where[self.keys[name]]]
        return file.descriptor, file.entries[self.keys[name]].start

    def forget(self) -> None:
        """Let go of the pages that were touched."""
        if self.checkpoint is not None:
            self.checkpoint.forget()


def stream_model(
    model: nn.Module,
    files: Files,
    device: torch.device,
    dtype: torch.dtype,
    quant: str | None,
    slots: int = SLOTS,
    resident: int = 0,
) -> StreamedBase:
    """Turn a model of mapped (or host) weights into a streamed one, in place."""
    blocks, modules = [], frozen_blocks(model)
    staying(len(modules), resident)  # refuses what cannot be before the work begins
    if files.scratch is None:
        _check_memory(model, modules, dtype, quant)
    strict = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    names = {id(module): name for name, module in model.named_modules()}
    fill = Fused(model, files)
    for module in modules:
        prefix = names[id(module)] + "."
        fill(prefix)
        if quant:
            quantise_block(module, quant, dtype, device)
        leaves = leaves_of(module, dtype, lambda name: any(part in name for part in strict))
        blocks.append(hold(leaves, device) if files.scratch is None else _on_disk(module, prefix, leaves, files))
        files.forget()
    embedding, head = input_embedding(model), output_head(model)
    fill("")
    if files.scratch is None:
        hold(leaves_of(nn.ModuleList([embedding, head]), dtype), device)
    streamed = {id(p) for part in (*modules, embedding, head) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in streamed:
            parameter.data = parameter.data.to(device, dtype, copy=True)
    if head.bias is not None:
        head.bias.data = head.bias.data.to(device, dtype, copy=True)
    base = StreamedBase(model, modules, blocks, head_blocks(model, files, dtype), device, dtype, slots, resident)
    base.forget = files.forget
    base.files = files  # the descriptors stay open as long as the model
    if quant:
        quantisation.steady(model)
    return base


def _check_memory(model: nn.Module, modules: list[nn.Module], dtype: torch.dtype, quant: str | None) -> None:
    """`BaseModelError` if the host lacks the memory for what will be held there."""
    shrunk = {id(part.weight) for module in modules for part in module.modules() if quant and type(part) is nn.Linear}
    parts = [*modules, input_embedding(model), output_head(model)]
    every = {id(p): p for part in parts for p in part.parameters()}
    need = sum(p.numel() * (BYTES[quant] if id(p) in shrunk else dtype.itemsize) for p in every.values())
    there = psutil.virtual_memory().available
    if need > there:
        raise BaseModelError(
            f"the base needs {need / 2**30:.1f} GiB of host memory and {there / 2**30:.1f} GiB are free: use stream: disk"
            + ("" if quant else ", or quant: nf4")
        )


def quantise_block(module: nn.Module, quant: str, dtype: torch.dtype, device: torch.device) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, quantisation.quantised_linear(child, quant, dtype, device))


def _on_disk(module: nn.Module, prefix: str, leaves: list[Leaf], files: Files) -> Block:
    """A block that is read from the checkpoint's files, and what they do not hold from the scratch file."""
    own = {id(parameter): name for name, parameter in module.named_parameters()}
    for leaf in leaves:
        place = leaf.places[0]
        name = own.get(id(place.owner))
        found = files.place_of(prefix + name) if name and leaf.home.is_floating_point() else None
        if found is None:
            start, leaf.home = files.scratch.write(leaf.home.to(leaf.dtype))
            found = files.scratch.descriptor, start
        leaf.file = found
    block = Block(leaves)
    block.put_home()
    return block


def head_blocks(model: nn.Module, files: Files, dtype: torch.dtype) -> list[Block]:
    """The head's weight in pieces of `CHUNK_BYTES`; from host memory as views of it, from disk by their place there."""
    head = output_head(model)
    weight = head.weight.data
    found = None
    if files.scratch is not None:
        found = next(filter(None, map(files.place_of, _names(model, head.weight))), None)
        if found is None:
            start, weight = files.scratch.write(weight.to(dtype))
            found, head.weight.data = (files.scratch.descriptor, start), weight
    rows, blocks = max(1, CHUNK_BYTES // (weight.shape[1] * weight.element_size())), []
    for start in range(0, weight.shape[0], rows):
        piece = weight[start : start + rows]
        leaf = Leaf([], piece, dtype)
        if found is not None:
            leaf.file = found[0], found[1] + start * weight.shape[1] * weight.element_size()
            blocks.append(Block([leaf]))
        else:
            block = Block([leaf])
            block.flat = piece.reshape(-1).view(torch.uint8)
            block.nbytes = block.flat.numel()
            blocks.append(block)
    return blocks


def _names(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """A parameter's names, of which a tied one has several."""
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]


class Fused:
    """Makes the parameters that the checkpoint holds in parts (the experts of a mixture), when a block's turn comes."""

    def __init__(self, model: nn.Module, files: Files) -> None:
        self.model, self.checkpoint = model, files.checkpoint
        self.made_of: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        if any(p.is_meta for p in model.parameters()):
            self._find()

    def _find(self) -> None:
        """Parameter → (transformers' converter, [(stored name, the converter's pattern for it)])."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        changes = get_model_conversion_mapping(self.model) or []
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        renamings = [change for change in changes if not isinstance(change, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = dict(self.model.state_dict(keep_vars=True))
        for key in sorted(self.checkpoint.where, key=_natural):
            new, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            if pattern is not None:
                self.made_of.setdefault(new, (by_pattern[pattern], []))[1].append((key, pattern))

    def __call__(self, prefix: str) -> None:
        """Fill the parameters whose names start so. `BaseModelError` for one that the checkpoint does not hold."""
        for target, (converter, sources) in self.made_of.items():
            if target.startswith(prefix) and any(p.is_meta for p in self._near(target)):
                made = copy.deepcopy(converter)
                for key, pattern in sources:
                    made.add_tensor(target, key, pattern, partial(self.checkpoint.tensor, key))
                found = made.convert(target, model=self.model, config=self.model.config)
                found = found[0] if isinstance(found, tuple) else found  # transformers 5.0 gives its errors besides
                for name, tensor in found.items():
                    tensor = tensor[0] if isinstance(tensor, list) else tensor
                    owner, _, leaf = name.rpartition(".")
                    self.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        lost = [n for n, p in self.model.named_parameters() if n.startswith(prefix) and p.is_meta]
        if lost:
            raise BaseModelError(f"{self.model.veneer_base.source}: {len(lost)} weights are missing, first {lost[0]}")

    def _near(self, target: str) -> list[nn.Parameter]:
        owner = self.model.get_submodule(target.rpartition(".")[0])
        return list(owner.parameters(recurse=False))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def fill_buffers(model: nn.Module) -> None:
    """Make the buffers that no checkpoint holds (rotary frequencies, say), as transformers does after loading."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # transformers' own mark: leave it as it is
    model.initialize_weights()

"""A run within its memory: what is chosen for it before it starts, the limit that it is held to, and the way down when
memory runs out all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from veneer.base.load import load_tokenizer, pick_device
from veneer.base.skeleton import read_config
from veneer.config import TrainConfig
from veneer.data.example import TokenizedExample
from veneer.errors import PlanError, RunError, VeneerError
from veneer.plan.fit import NAMES, Plan, Wish, describe, find, text
from veneer.plan.here import Machine, machine
from veneer.plan.probe import tight_malloc
from veneer.training.accelerate import use_compile
from veneer.training.setup import load_data

Note = Callable[[str], None]
Step = tuple[str, int]
"""A dial and the tokens of a row."""
KEYS = {axis: tuple(name.rpartition(".")[::2]) for axis, name in NAMES.items()}
"""What a plan chooses → (section of the configuration, key)."""
AMPLE = 0.4
"""On a CPU whose free memory is so much more than a rough estimate (this share of it), nothing is planned."""


def choose(config: TrainConfig, note: Note) -> tuple[TrainConfig, Plan | None]:
    """The configuration with what its user left out chosen to fit train.vram, or the device's free memory.

    Without train.vram nothing is chosen that changes results (precision, optimiser, streaming), and on a CPU nothing as
    long as the defaults fit. Raises `PlanError` where train.vram is given and nothing fits.
    """
    stated = config.train.vram is not None
    try:
        device = torch.device(pick_device(config.device))
        if device.type not in ("cpu", "cuda") or (not stated and device.type == "cpu" and _ample(config)):
            return config, None
        here = machine(str(device), config.train.vram, None, config.dtype)
        plan = _plan(config, here, stated)
    except PlanError as error:
        if stated:
            raise
        note(f"warning: {error}")
        return config, None
    except VeneerError as error:
        if stated:  # without a budget whatever is wrong is said where it matters
            note(f"warning: no plan for train.vram: {error}")
        return config, None
    for line in here.notes:
        note(line)
    chosen = _taken(config, plan)
    if chosen != config:
        o = plan.chosen
        note(
            f"chosen for {here.name}: {describe(o.setting)}; about {text(o.need.total)} ({text(o.wanted)} with the margin) and "
            f"{o.time.tokens_per_second:,.0f} tokens/s (veneer plan says why)"
        )
    return chosen, plan


def _plan(config: TrainConfig, here: Machine, stated: bool) -> Plan:
    fixed = {axis: value for axis in KEYS if (value := _given(config, axis)) is not None}
    if not stated:
        fixed |= {axis: _value(config, axis) for axis in ("quant", "optimizer", "stream")}
        if not here.budget.cuda:
            fixed |= {"micro_tokens": config.train.micro_batch_tokens}
    adapter = config.adapter
    whole = adapter.modules_to_save or adapter.trainable_tokens or adapter.new_tokens or adapter.invocation
    if whole or adapter.bias != "none":
        fixed.setdefault("stream", "off")  # which takes adapters inside the blocks alone
    longest, tokens = lengths(config)
    if "micro_tokens" in fixed:
        fixed["micro_tokens"] = max(longest, fixed["micro_tokens"])
    device = torch.device("cuda" if here.budget.cuda else "cpu")
    wish = Wish(longest, max(longest, tokens), fixed, use_compile(config.train.compile, device))
    return find(here.profile(config.model, adapter), here.budget, here.rates, wish)


def _given(config: TrainConfig, axis: str) -> Any:
    """What the user wrote for an axis; None where nothing, or auto."""
    owner, key = _place(config, axis)
    return value if key in owner.model_fields_set and (value := getattr(owner, key)) != "auto" else None


def _value(config: TrainConfig, axis: str) -> Any:
    """What an axis is without a plan."""
    value = getattr(*_place(config, axis))
    return 0 if value == "auto" else value


def _place(config: TrainConfig, axis: str) -> tuple[Any, str]:
    """The section of the configuration that has an axis, and its key there."""
    section, key = KEYS[axis]
    return (getattr(config, section) if section else config), key


def _taken(config: TrainConfig, plan: Plan) -> TrainConfig:
    """The configuration with the plan's choices where its user made none."""
    made = config.model_copy(deep=True)
    for axis in KEYS:
        value = getattr(plan.chosen.setting, axis)
        if _given(config, axis) is None and value != _value(config, axis):
            setattr(*_place(made, axis), value)
    return made


def adopt(config: TrainConfig, run: Path) -> TrainConfig:
    """For a run that is resumed: what was chosen when it began, where the user does not say otherwise. How many blocks stay
    on the device goes with where the others are."""
    made, old = config.model_copy(deep=True), TrainConfig.load(run / "config.yaml")
    for axis in KEYS:
        owner, key = _place(made, axis)
        if key not in owner.model_fields_set and (axis != "resident" or made.train.stream == old.train.stream):
            setattr(owner, key, getattr(*_place(old, axis)))
    return made


def lengths(config: TrainConfig) -> tuple[int, int]:
    """The longest example of a run in tokens, and tokens of an average step. Tokenised data are kept for the run."""
    if config.adapter.new_tokens:
        return config.data.max_length, config.data.max_length * config.train.batch_size
    tokenizer = load_tokenizer(config.model, chat_template=config.data.chat_template)
    counts = load_data(config, "train", tokenizer, lambda line: None).counts
    return counts.longest, round(counts.tokens / max(1, counts.examples) * config.train.batch_size)


def _ample(config: TrainConfig) -> bool:
    """Whether the CPU's free memory is far more than what the configuration's sizes suggest."""
    sizes = read_config(config.model).get_text_config()
    hidden, layers = getattr(sizes, "hidden_size", 0), getattr(sizes, "num_hidden_layers", 0)
    inner = getattr(sizes, "intermediate_size", None) or 4 * hidden
    tokens = max(config.train.micro_batch_tokens, config.data.max_length)
    weights = 4 * layers * (4 * hidden**2 + 3 * hidden * inner) + 8 * getattr(sizes, "vocab_size", 0) * hidden
    activations = 4 * tokens * layers * (12 * hidden + 4 * inner)
    return 2 * weights + activations < AMPLE * psutil.virtual_memory().available


@contextmanager
def hold(vram: float | None, device: torch.device, plan: Plan | None) -> Iterator[None]:
    """A GPU's allocator kept to train.vram for the length of a block, less what CUDA itself holds. On a CPU freed memory
    is given back at once."""
    if vram is None or device.type != "cuda":
        if vram is not None:
            tight_malloc()
        yield
        return
    context = plan.budget.context if plan is not None and plan.budget.context else 0.0
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.mem_get_info(index)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (vram - context) / total)), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def ways_down(config: TrainConfig, plan: Plan | None, cuda: bool, longest: int) -> list[Step]:
    """What to change to when memory runs out, in order: the plan's steps down, or without one the dial and then ever
    smaller rows."""
    dial, tokens = config.train.checkpointing, config.train.micro_batch_tokens
    if plan is not None and plan.steps_down:
        return [(o.setting.dial, o.setting.micro_tokens) for o in plan.steps_down]
    spent = config.train.keep_blocks or _value(config, "resident")
    first = [(dial, tokens)] if spent else []  # a step down keeps no blocks, and lets none stay on the device
    order = ["keep", "selective", "recompute"] + (["recompute-offload"] if cuda else [])
    at = order.index(dial) if dial in order else len(order) - (1 if cuda else 2)
    found = first + [(other, tokens) for other in order[at + 1 :] if cuda or other != "selective"]
    while tokens > longest and tokens > 16:
        tokens = max(longest, tokens // 2)
        found.append((found[-1][0] if found else dial, tokens))
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of memory: a device's, pinned host memory's, or a CPU's."""
    words = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(
            sign in words for sign in ("not enough memory", "out of memory", "alloc_cpu", "CUBLAS_STATUS_ALLOC_FAILED")
        )
    )


def exhausted(error: BaseException, longest: int) -> RunError:
    """The end of the way down, in one line."""
    free = ""
    if torch.cuda.is_available():
        free = f"; {text(torch.cuda.mem_get_info()[0])} of the device are free, other processes included"
    shorter = max(64, 1 << (longest - 1).bit_length() - 1)
    return RunError(
        f"out of memory with the least that a plan has{free}: set data.max_length to {shorter} or less, quant: nf4, "
        f"a smaller adapter.rank or a larger train.vram ({str(error).splitlines()[0][:120]})"
    )


def longest_batch(data: Sequence[TokenizedExample], batch: int) -> list[TokenizedExample]:
    """The examples of a batch that is as hard on memory as any: the longest ones."""
    order = sorted(range(len(data)), key=lambda i: -len(data[i].input_ids))[:batch]
    return [data[i] for i in order]

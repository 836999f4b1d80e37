"""`veneer bench`: how fast a training step is on this machine, how near to what it could be, and where memory goes."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from veneer.adapter.attach import attach, get_bank
from veneer.adapter.frozen import shape_of
from veneer.adapter.targets import output_head
from veneer.base.load import load_base, pick_device, pick_dtype
from veneer.config import AdapterConfig, OptimConfig
from veneer.data.example import TokenizedExample
from veneer.errors import BaseModelError, ConfigError
from veneer.files import writing
from veneer.plan.probe import matmul_rate as matmul_rate
from veneer.training.accelerate import Accelerated, use_compile
from veneer.training.flat import FlatOptimizer
from veneer.training.forward import RowModel
from veneer.training.graphs import RowGraphs

Step = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """One side's steps. `limit_share` is the least time that the step's products need over the time taken; `memory` has
    bytes by component, "peak" the most at once (on a CPU: the process's resident memory) and "other" what is left."""

    name: str
    tokens_per_second: float
    step_seconds: float
    first_step_seconds: float
    limit_share: float
    loss: float
    memory: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def open_model(name: str, device: str, dtype: Any, quant: str | None) -> nn.Module:
    """A base as `load_base` gives it; for a directory with a config.json and no weights, random ones."""
    path = Path(name).expanduser()
    if (path / "config.json").exists() and not any(path.glob("*.safetensors")) and not any(path.glob("*.gguf")):
        from transformers import AutoConfig, AutoModelForCausalLM

        if quant not in (None, "none"):
            raise ConfigError(f"{name} has no weights: random ones are not quantised; leave out --quant")
        place = pick_device(device)
        with torch.device(place):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=pick_dtype(dtype, place))
        return model.requires_grad_(False)
    return load_base(name, device=device, dtype=dtype, quant=quant)[0]


def step_flops(model: nn.Module, tokens: int) -> float:
    """4·P·T: forward and backward through the P weights of all frozen linears, without recomputation or attention."""
    sizes = [shape_of(m) for m in model.modules() if not hasattr(m, "base_layer")]
    return 4.0 * sum(s[0] * s[1] for s in sizes if s) * tokens


def veneer_step(
    model: nn.Module, adapter: AdapterConfig, train: OptimConfig, lengths: list[int], stack: ExitStack
) -> tuple[Step, dict[str, int]]:
    """Veneer's step on random tokens of these lengths, and bytes by component. `stack` holds what must be undone."""
    attach(model, adapter, seed=0)
    model.train()
    bank = get_bank(model)
    trained = bank.parameters("default")
    optimizer, rows_of = FlatOptimizer(trained, train), RowModel(model, packing=train.pack != "off")
    device = next(model.parameters()).device
    compiled = use_compile(train.compile, device)
    fast = Accelerated(
        model, modes=train.checkpointing, keep=train.keep_blocks, compile=compiled, dynamic=len(set(lengths)) > 1
    )
    graphs = RowGraphs(rows_of, fast, train, warnings.warn)
    stack.enter_context(rows_of.attention())
    stack.enter_context(fast)
    random, vocabulary = np.random.default_rng(0), output_head(model).weight.shape[0]
    examples = [
        TokenizedExample(random.integers(0, vocabulary, n).astype(np.int32), np.ones(n, dtype=bool)) for n in lengths
    ]
    rows = rows_of.pack(examples, train.micro_batch_tokens, False)
    supervised = sum(len(row.targets) for row in rows)

    def step() -> float:
        optimizer.zero_grad()
        losses = []
        for row in rows:
            fast.start(unchanged=bool(losses))
            losses.append(graphs.backward(row, 1 / supervised))
        optimizer.step()
        return float(sum(losses)) / supervised

    return step, _components(model, list(trained.values()), optimizer)


def _components(model: nn.Module, trained: list[nn.Parameter], optimizer: Any) -> dict[str, int]:
    mine = {p.data_ptr() for p in trained}
    every = {p.data_ptr(): p for p in [*model.parameters(), *model.buffers()]}
    adapter = sum(p.numel() * p.element_size() for p in trained)
    return {
        "base": sum(p.numel() * p.element_size() for at, p in every.items() if at not in mine),
        "adapter": adapter,
        "gradients": adapter,
        "optimiser": 2 * sum(4 * p.numel() for p in trained),
    }


def peft_step(model: nn.Module, adapter: AdapterConfig, train: OptimConfig, lengths: list[int]) -> Step:
    """The same work through PEFT and the model's own loss, padded to the longest. `BaseModelError` without PEFT."""
    try:
        import peft
    except ImportError:
        raise BaseModelError("--against peft needs PEFT: pip install peft") from None
    targets = adapter.target_modules
    config = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets, task_type="CAUSAL_LM")
    if train.checkpointing != "keep":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=train.lr)
    device = next(model.parameters()).device
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (len(lengths), max(lengths)))).to(device)
    seen = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    labels = ids.masked_fill(~seen, -100)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=seen.long(), labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def measure(
    name: str,
    step: Step,
    tokens: int,
    flops: float,
    rate: float,
    parts: dict[str, int],
    device: torch.device,
    steps: int,
) -> Timing:
    """Three steps to warm up (a graph is captured in the second), then the median of `steps`."""
    began = time.perf_counter()
    step()
    first = time.perf_counter() - began
    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times, peak, loss = [], 0, 0.0
    for _ in range(steps):
        began = time.perf_counter()
        loss = step()
        _wait(device)
        times.append(time.perf_counter() - began)
        peak = max(peak, _memory(device))
    median = statistics.median(times)
    memory = parts | {"other": max(0, peak - sum(parts.values())), "peak": peak}
    return Timing(name, tokens / median, median, first, flops / rate / median, loss, memory)


def trace(step: Step, file: Path) -> None:
    """One step as a Chrome trace. Raises `RunError` (disk)."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=kinds) as recorded:
        step()
    with writing(file, kept=""):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
        recorded.export_chrome_trace(str(file))
        if not file.stat().st_size:  # torch says so in its log alone
            file.with_name(f"{file.name}.tmp").unlink(missing_ok=True)
            raise OSError("torch could not write it: is the disk full?")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss

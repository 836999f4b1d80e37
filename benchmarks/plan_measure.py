"""A worker of benchmarks/bench_plan.py: what the plan says of a setting, and what it takes, one setting after the other.

Libraries are imported and the device is opened once. Before each setting all device memory is given back, cuBLAS's
workspaces and pinned host memory too, so that a setting finds the device as a run does; a worker that cannot give all
back ends, and another takes its place. On a GPU peaks of allocated and reserved memory are of all steps from the first
on: a compiled setting with CUDA graphs takes a row plainly, captures it, replays it, and then takes a row with fewer
targets, which no graph fits: that is the most that a run comes to hold. `held` says whether the same steps run once
more, graphs captured anew, with the allocator kept to the prediction and the plan's margin. Nothing is compiled again
for it.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from plan_cases import Case, config_folder

LEFT = 16 << 20
"""Bytes that a worker may have on the device between settings: tables that libraries keep."""
Step = Callable[..., float]


def build(case: Case, device: str):
    """A model with random weights on the device, quantised there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from veneer.base.quant import quantise

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_folder(case)), dtype=dtype)
    model.requires_grad_(False)
    return quantise(model, case.quant, dtype, device) if case.quant != "none" and case.stream == "off" else model


def examples(lengths, vocabulary: int, other: bool = False) -> list:
    """Random tokens in sequences of these lengths, all supervised, or (`other`) all but the first eighth of each."""
    import numpy as np

    from veneer.data.example import TokenizedExample

    random, found = np.random.default_rng(0), []
    for n in lengths:
        supervised = np.arange(n) >= (-(-n // 8) if other else 0)
        found.append(TokenizedExample(random.integers(0, vocabulary, n).astype(np.int32), supervised))
    return found


def step_of(case: Case, model, stack: ExitStack, note: Callable[[str], None]) -> Step:
    """A training step of this setting as `veneer train` makes it; `note` is told what cannot be compiled or captured."""
    from veneer.config import AdapterConfig, OptimConfig

    adapter = AdapterConfig(rank=case.rank, alpha=2 * case.rank)
    train = OptimConfig(
        micro_batch_tokens=sum(case.lengths), checkpointing=case.dial, compile="on" if case.compile else "off",
        keep_blocks=case.keep, resident_blocks=case.resident,
    )  # fmt: skip
    made = resident_step if case.stream == "off" else streamed_step
    return made(case, model, adapter, train, stack, note)


def resident_step(case: Case, model, adapter, train, stack: ExitStack, note: Callable[[str], None]) -> Step:
    """`step(other)`: a row of this setting, or one with fewer targets, for which a graph of its own would be captured."""
    from veneer.adapter.attach import attach, get_bank
    from veneer.training.accelerate import Accelerated
    from veneer.training.flat import FlatOptimizer
    from veneer.training.forward import RowModel
    from veneer.training.graphs import RowGraphs

    attach(model, adapter, seed=0)
    model.train()
    optimizer, rows_of = FlatOptimizer(get_bank(model).parameters("default"), train), RowModel(model)
    fast = Accelerated(model, modes=case.dial, keep=case.keep, compile=case.compile, note=note)
    graphs = RowGraphs(rows_of, fast, train, note)
    stack.enter_context(rows_of.attention())
    stack.enter_context(fast)
    rows = [
        rows_of.pack(examples(case.lengths, model.config.vocab_size, other), train.micro_batch_tokens, False)
        for other in (False, True)
    ]

    def step(other: bool = False) -> float:
        own = rows[other]
        supervised = sum(len(row.targets) for row in own)
        optimizer.zero_grad()
        losses = []
        for row in own:
            fast.start(unchanged=bool(losses))
            losses.append(graphs.backward(row, 1 / supervised))
        optimizer.step()
        return float(sum(losses)) / supervised

    step.graphs = graphs
    return step


def streamed_step(case: Case, model, adapter, train, stack: ExitStack, note: Callable[[str], None]) -> Step:
    """`step()` over a base whose blocks are in host memory, but for those that stay on the device."""
    import torch

    from veneer.adapter.attach import attach, get_bank
    from veneer.base.stream_load import Files, stream_model
    from veneer.training.flat import FlatOptimizer
    from veneer.training.streamed import StreamedRows

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = next(model.parameters()).dtype
    model = model.to("cpu")
    torch.cuda.empty_cache() if device.type == "cuda" else None
    quant = None if case.quant == "none" else case.quant
    stream_model(model, Files(None, {}), device, dtype, quant, resident=case.resident)
    model.requires_grad_(False)
    attach(model, adapter, seed=0)
    model.veneer_stream.settle()
    model.train()
    optimizer = FlatOptimizer(get_bank(model).parameters("default"), train)
    rows_of = StreamedRows(model, modes=case.dial, keep=case.keep, compile=case.compile, note=note)
    stack.enter_context(rows_of.attention())
    stack.enter_context(rows_of)
    rows = rows_of.pack(examples(case.lengths, model.config.vocab_size), train.micro_batch_tokens, False)
    supervised = sum(len(row.targets) for row in rows)

    def step(other: bool = False) -> float:
        optimizer.zero_grad()
        losses = rows_of.backward(rows, supervised)
        optimizer.step()
        return float(sum(losses)) / supervised

    return step


@cache
def profile_of(shape: str, layers: int, rank: int, rows: str, dtype: str):
    """The plan's profile of a shape under an adapter."""
    from veneer.config import AdapterConfig
    from veneer.plan.profile import profile

    folder = config_folder(Case(shape, layers, "none", (1,), rank, "keep"))
    return profile(folder, AdapterConfig(rank=rank, alpha=2 * rank), dtype=dtype, rows=rows)


def planned(case: Case, cuda: bool) -> tuple:
    """The plan's profile and setting for a case."""
    from veneer.plan import bytes as size

    tokens, same = sum(case.lengths), len(set(case.lengths)) == 1
    rows = "split" if not cuda else "equal" if same else "mixed"
    about = profile_of(case.shape, case.layers, case.rank, rows, "bfloat16" if cuda else "float32")
    setting = size.Setting(
        quant=case.quant, dial=case.dial, micro_tokens=tokens, sequence=max(case.lengths), tokens=tokens,
        compile=case.compile, stream=case.stream, keep=case.keep,
        resident=case.resident,
    )  # fmt: skip
    return about, replace(setting, graphs=cuda and size.can_have_graphs(setting))


def predicted(case: Case, rates, cuda: bool, context: float | None = None) -> dict:
    """What the plan says of this setting; without rates nothing of its time."""
    from veneer.plan import bytes as size
    from veneer.plan.roofline import step

    about, setting = planned(case, cuda)
    need = size.need(about, setting, cuda=cuda, context=context)
    time = {} if rates is None else {"time": step(about, setting, replace(rates, queued=cuda)).as_dict()}
    return {"need": need.as_dict()} | time


def memory_of(case: Case, rates: dict, wait: Callable[[], None]) -> dict:
    """The memory of one case on a GPU."""
    import torch

    from veneer.plan.constants import MARGIN
    from veneer.plan.roofline import Rates

    record, notes = predicted(case, Rates(**rates), True) | {"rates": rates}, []
    model = build(case, "cuda")
    clean()
    base = {"base": torch.cuda.memory_allocated()} if case.stream == "off" else {}
    torch.cuda.reset_peak_memory_stats()
    with ExitStack() as stack:
        step = step_of(case, model, stack, notes.append)
        if case.stream != "off":  # whose base was on the device to be made, as a run's never is
            clean()
            torch.cuda.reset_peak_memory_stats()
        built = torch.cuda.memory_allocated()
        measured = steps(case, step) | base | {"built": built, "at_rest": torch.cuda.memory_allocated()}
        measured["graphs"] = captured(step)
        record |= {"measured": measured, "notes": list(notes)}
        drop_graphs(step)
        limit = record["need"]["reserved"] * (1 + MARGIN)
        record["held"] = held(case, step, limit, measured["graphs"], notes)
    return record


def steps(case: Case, step: Step) -> dict:
    """Peaks of the first step, of the next ones and of one with another row, and of all of them."""
    import torch

    found, times = {}, []
    for name, count, other in (("first", 1, False), ("later", 3, False), ("other", 1, True)):
        if other and not planned(case, True)[1].graphs:
            continue
        for _ in range(count):
            began = time.time()
            step(other)
            torch.cuda.synchronize()
            times.append(time.time() - began)
        found[name] = measured_gpu()
        torch.cuda.reset_peak_memory_stats()
    peaks = {key: max(part[key] for part in found.values()) for key in ("allocated", "reserved")}
    seconds = min(times[1:])
    return peaks | {
        "steps": found, "seconds": seconds, "first_seconds": times[0], "tokens_per_second": sum(case.lengths) / seconds,
    }  # fmt: skip


def captured(step: Step) -> int:
    """Graphs that were captured."""
    return len(step.graphs.graphs) if hasattr(step, "graphs") else 0


def drop_graphs(step: Step) -> None:
    """Let go of captured graphs and of all memory that is free; compiled code stays."""
    import torch

    if hasattr(step, "graphs"):
        step.graphs.graphs.clear()
        step.graphs.seen.clear()
        step.graphs.pool = None
    clean()
    torch.cuda.reset_peak_memory_stats()


def held(case: Case, step: Step, limit: float, graphs: int, notes: list[str]) -> bool | str:
    """Whether the steps run with the allocator capped at `limit` bytes, with as many graphs: True, or the error."""
    import torch

    before = len(notes)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    try:
        steps(case, step)
    except torch.OutOfMemoryError as error:
        return str(error).splitlines()[0][:200]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    short = captured(step) < graphs or len(notes) > before
    return "; ".join(notes[before:])[:200] or "fewer graphs were captured" if short else True


def speed_of(case: Case, rates: dict, wait: Callable[[], None]) -> dict:
    """The speed of one case: compiled and warm beside others, then, once `wait` returns, alone on its device."""

    from veneer.plan.roofline import Rates

    record, notes = predicted(case, Rates(**rates), True) | {"rates": rates}, []
    with ExitStack() as stack:
        step = step_of(case, build(case, "cuda"), stack, notes.append)
        first, *_ = [timed(step) for _ in range(3)]
        drop_graphs(step)
        wait()
        times = [timed(step) for _ in range(10)][3:]
        seconds = statistics.median(times)
        record["measured"] = measured_gpu() | {
            "graphs": captured(step), "seconds": seconds, "first_seconds": first,
            "tokens_per_second": sum(case.lengths) / seconds,
        }  # fmt: skip
    return record | {"notes": notes}


def timed(step: Step) -> float:
    """Seconds of a step."""
    import torch

    began = time.time()
    step()
    torch.cuda.synchronize()
    return time.time() - began


def measured_gpu() -> dict:
    import torch

    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def clean() -> None:
    """Give back all device memory that is free, cuBLAS's workspaces and pinned host memory too."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    getattr(torch._C, "_host_emptyCache", lambda: None)()


def cpu_memory_of(case: Case, rates: dict, wait: Callable[[], None]) -> dict:
    """Memory and speed of one case in this process; the rates come from another one, as to measure them leaves memory
    behind."""
    import torch

    from veneer.plan.probe import process_bytes, tight_malloc
    from veneer.plan.roofline import Rates

    torch.set_num_threads(1)
    tight_malloc()  # as a run with train.vram does
    predicted(case, Rates(**rates), False)
    before, notes = process_bytes(), []
    record = predicted(case, Rates(**rates), False, before) | {"rates": rates, "context": before}
    model = build(case, "cpu")
    with ExitStack() as stack:
        step = step_of(case, model, stack, notes.append)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        times = []
        for _ in range(2):
            start = time.process_time()  # one thread's own work: other processes may be at work
            step()
            times.append(time.process_time() - start)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    seconds = min(times)
    measured = {"rss": peak, "seconds": seconds, "tokens_per_second": sum(case.lengths) / seconds}
    return record | {"measured": measured, "notes": notes}


def rates_here(device: str) -> dict:
    """A GPU's rates, or a CPU's at this moment on one thread, in seconds of its own work."""
    import torch

    from veneer.plan.probe import measure

    if device == "cuda":
        return measure(torch.device("cuda", 0), torch.bfloat16, 0.4).as_dict()
    torch.set_num_threads(1)
    return measure(torch.device("cpu"), torch.float32, 0.3, time.process_time).as_dict()


def on_gpu(gpu: str, threads: int) -> None:
    """This process on one GPU alone, with so many threads to compile; before torch is imported."""
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir()) / "veneer-inductor")
    os.environ |= {"CUDA_VISIBLE_DEVICES": gpu, "TORCHINDUCTOR_CACHE_DIR": str(Path(kept) / f"gpu{gpu}")}
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def serve(pipe: Any, device: str, gpu: str | None, threads: int) -> None:
    """A worker: says that it is there; then answers (work, case, rates) with (record, whether it goes on) until None."""
    if gpu is not None:
        on_gpu(gpu, threads)
    import veneer.training.bench  # noqa: F401 all that a run imports
    import veneer.training.streamed  # noqa: F401

    def wait() -> None:
        pipe.send("ready")
        pipe.recv()

    pipe.send("there")
    measures = {"memory": memory_of, "speed": speed_of, "cpu": cpu_memory_of}
    while (asked := pipe.recv()) is not None:
        work, case, rates = asked
        known = {"case": asdict(case)} if case else {}
        try:
            answer = known | (rates_here(device) if work == "rates" else measures[work](case, rates, wait))
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            pipe.send((known | {"failed": f"{type(error).__name__}: {text[0][:400]}"}, False))
            return
        left = given_back() if device == "cuda" else 0
        stays = device == "cuda" and left < LEFT
        pipe.send((answer | ({"left": left} if case else {}), stays))
        if not stays:
            return


def given_back() -> int:
    """Forget what was compiled and free the device; bytes that are left on it."""
    import torch

    torch._dynamo.reset()
    clean()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    sys.exit("benchmarks/bench_plan.py starts this")

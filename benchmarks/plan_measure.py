"""One setting of benchmarks/bench_plan.py in a process of its own: what the plan says of it, and what it takes.

Prints a line of JSON behind the word RESULT. On a GPU peaks of allocated and reserved memory are of all steps from the
first on: a compiled setting with CUDA graphs takes a row plainly, captures it, replays it, and then takes a row of as
many tokens in other sequences, which is the most that a run comes to hold. `held` says whether the same steps run, from
the adapter on, with the allocator kept to the prediction and the plan's margin.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from plan_cases import Case, config_folder

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


def examples(lengths, vocabulary: int) -> list:
    """Random tokens in sequences of these lengths, all supervised."""
    import numpy as np

    from veneer.data.example import TokenizedExample

    random = np.random.default_rng(0)
    return [TokenizedExample(random.integers(0, vocabulary, n).astype(np.int32), np.ones(n, bool)) for n in lengths]


def step_of(case: Case, model, stack: ExitStack) -> Step:
    """A training step of this setting as `veneer train` makes it."""
    from veneer.config import AdapterConfig, OptimConfig

    adapter = AdapterConfig(rank=case.rank, alpha=2 * case.rank)
    train = OptimConfig(
        micro_batch_tokens=sum(case.lengths), checkpointing=case.dial, compile="on" if case.compile else "off",
        keep_blocks=case.keep,
    )  # fmt: skip
    made = resident_step if case.stream == "off" else streamed_step
    return made(case, model, adapter, train, stack)


def resident_step(case: Case, model, adapter, train, stack: ExitStack) -> Step:
    """`step(other)`: a row of this setting, or one of as many tokens whose first sequence is cut in two."""
    import warnings

    from veneer.adapter.attach import attach, get_bank
    from veneer.training.accelerate import Accelerated
    from veneer.training.flat import FlatOptimizer
    from veneer.training.forward import RowModel
    from veneer.training.graphs import RowGraphs

    attach(model, adapter, seed=0)
    model.train()
    optimizer, rows_of = FlatOptimizer(get_bank(model).parameters("default"), train), RowModel(model)
    fast = Accelerated(model, modes=case.dial, keep=case.keep, compile=case.compile)
    graphs = RowGraphs(rows_of, fast, train, warnings.warn)
    stack.enter_context(rows_of.attention())
    stack.enter_context(fast)
    first, *rest = case.lengths
    lengths = case.lengths, (first // 2, first - first // 2, *rest)
    rows = [rows_of.pack(examples(l, model.config.vocab_size), train.micro_batch_tokens, False) for l in lengths]

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


def streamed_step(case: Case, model, adapter, train, stack: ExitStack):
    """`step()` over a base whose blocks are in host memory."""
    import torch

    from veneer.adapter.attach import attach, get_bank
    from veneer.base.stream_load import Files, stream_model
    from veneer.training.flat import FlatOptimizer
    from veneer.training.streamed import StreamedRows

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = next(model.parameters()).dtype
    model = model.to("cpu")
    torch.cuda.empty_cache() if device.type == "cuda" else None
    stream_model(model, Files(None, {}), device, dtype, None if case.quant == "none" else case.quant)
    model.requires_grad_(False)
    attach(model, adapter, seed=0)
    model.veneer_stream.settle()
    model.train()
    optimizer = FlatOptimizer(get_bank(model).parameters("default"), train)
    rows_of = StreamedRows(model, modes=case.dial, keep=case.keep, compile=case.compile)
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
    )  # fmt: skip
    return about, replace(setting, graphs=cuda and size.can_have_graphs(setting))


def predicted(case: Case, rates, cuda: bool, context: float | None = None) -> dict:
    """What the plan says of this setting."""
    from veneer.plan import bytes as size
    from veneer.plan.roofline import step

    about, setting = planned(case, cuda)
    need = size.need(about, setting, cuda=cuda, context=context)
    return {"need": need.as_dict(), "time": step(about, setting, replace(rates, queued=cuda)).as_dict()}


def gpu_worker(case: Case, rates: dict) -> None:
    """The memory of one case."""
    import torch

    from veneer.adapter.attach import detach
    from veneer.plan.constants import MARGIN
    from veneer.plan.roofline import Rates

    record = predicted(case, Rates(**rates), True) | {"rates": rates}
    torch.zeros(1, device="cuda")
    model = build(case, "cuda")
    clean()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with ExitStack() as stack:
        step = step_of(case, model, stack)
        built = torch.cuda.memory_allocated()
        measured = steps(case, step) | {"base": base, "built": built, "at_rest": torch.cuda.memory_allocated()}
        if case.stream == "off":
            measured["graphs"] = len(step.graphs.graphs)
        del step
    record["measured"] = measured
    detach(model) if case.stream == "off" else None
    if case.stream == "off":
        if case.compile:
            torch._dynamo.reset()
        clean()
        measured["left_over"] = torch.cuda.memory_allocated() - base
        limit = record["need"]["reserved"] * (1 + MARGIN) + max(0, measured["left_over"])
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
        record["held"] = held(case, model)
    say(case, record)


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


def held(case: Case, model) -> bool | str:
    """Whether the steps run with the allocator capped: True, or the error."""
    import torch

    try:
        with ExitStack() as stack:
            steps(case, step_of(case, model, stack))
        return True
    except torch.OutOfMemoryError as error:
        return str(error).splitlines()[0][:200]


def speed_worker(case: Case, rates: dict, lock: str) -> None:
    """The speed of one case, alone on its device."""
    import torch

    import veneer.training.bench  # noqa: F401 what is imported before the device is this process's alone
    from veneer.plan.roofline import Rates

    record = predicted(case, Rates(**rates), True) | {"rates": rates}
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        total = torch.cuda.mem_get_info()[1]
        with ExitStack() as stack:
            step = step_of(case, build(case, "cuda"), stack)
            began, times = time.time(), []
            step()
            torch.cuda.synchronize()
            first = time.time() - began
            for _ in range(9):
                began = time.time()
                step()
                torch.cuda.synchronize()
                times.append(time.time() - began)
            seconds = statistics.median(times[3:])
            record["measured"] = measured_gpu() | {
                "context": total - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved(),
                "seconds": seconds, "first_seconds": first, "tokens_per_second": sum(case.lengths) / seconds,
            }  # fmt: skip
    say(case, record)


def measured_gpu() -> dict:
    import torch

    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def clean() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def cpu_worker(case: Case, rates: dict) -> None:
    """Measure one case in this process; the rates come from another one, as to measure them leaves memory behind."""
    import torch

    import veneer.training.bench  # noqa: F401 all that a run imports
    from veneer.plan.probe import process_bytes, tight_malloc
    from veneer.plan.roofline import Rates

    torch.set_num_threads(1)
    tight_malloc()  # as a run with train.vram does
    predicted(case, Rates(**rates), False)
    before = process_bytes()
    record = predicted(case, Rates(**rates), False, before) | {"rates": rates, "context": before}
    model = build(case, "cpu")
    with ExitStack() as stack:
        step = step_of(case, model, stack)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        times = []
        for _ in range(2):
            start = time.process_time()  # one thread's own work: other processes may be at work
            step()
            times.append(time.process_time() - start)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    seconds = min(times)
    record["measured"] = {"rss": peak, "seconds": seconds, "tokens_per_second": sum(case.lengths) / seconds}
    say(case, record)


def say(case: Case, record: dict) -> None:
    print("RESULT " + json.dumps({"case": asdict(case)} | record), flush=True)


def rates_here(device: str) -> dict:
    """A GPU's rates, or a CPU's at this moment on one thread, in seconds of its own work."""
    import torch

    from veneer.plan.probe import measure

    if device == "cuda":
        return measure(torch.device("cuda", 0), torch.bfloat16, 0.4).as_dict()
    torch.set_num_threads(1)
    return measure(torch.device("cpu"), torch.float32, 0.3, time.process_time).as_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("rates", "memory", "speed"))
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--case", type=json.loads)
    parser.add_argument("--rates", type=json.loads)
    parser.add_argument("--lock")
    options = parser.parse_args()
    if options.work == "rates":
        print("RESULT " + json.dumps(rates_here(options.device)), flush=True)
        return
    case = Case(**options.case | {"lengths": tuple(options.case["lengths"])})
    if options.device == "cpu":
        cpu_worker(case, options.rates)
    elif options.work == "memory":
        gpu_worker(case, options.rates)
    else:
        speed_worker(case, options.rates, options.lock)


if __name__ == "__main__":
    main()

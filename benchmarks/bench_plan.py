"""What `veneer plan` predicts against what a step needs: peak memory and tokens/s over a grid of settings.

    python benchmarks/bench_plan.py --out benchmarks/results/plan_gpu.json            on an NVIDIA GPU
    python benchmarks/bench_plan.py --device cpu --out benchmarks/results/plan_cpu.json
    python benchmarks/bench_plan.py --device cpu --smoke                              three tiny settings

Random weights made on the device, random tokens, real forward, backward and update. On a GPU one process measures all
settings of an architecture one after the other (peak allocated and reserved), and then takes one more step with its
memory held to the prediction and the plan's margin: `held` says whether it ran. On a CPU each setting is a process of
its own, with freed memory given back as in a run with train.vram, and the peak is of resident memory (VmHWM); seconds
are of one thread's own work. Only some settings are compiled, as that costs seconds each. Results are written as they
come; a setting that fails is recorded and the next one runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072}
SHAPES = {
    "SmolLM2-135M": LLAMA | dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "Llama-3.2-1B": LLAMA | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, head_dim=64),
    "Qwen3-4B": dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_size=2560, intermediate_size=9728,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=True, max_position_embeddings=40960),
    "Llama-3.1-8B": LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
    "tiny": LLAMA | dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=8192, tie_word_embeddings=True),
    "small": LLAMA | dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=16384, tie_word_embeddings=False),
    "qwen-small": dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_size=384, intermediate_size=1152,
        num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2, head_dim=64, vocab_size=12288,
        tie_word_embeddings=True, max_position_embeddings=4096),
}  # fmt: skip
LENGTHS = [[256] * 4, [512] * 16, [1024] * 2, [2048], [2048] * 4, [4096] * 2, [8192], [16384]]
RANKS, DIALS = (4, 16, 32, 64, 128), ("keep", "recompute", "recompute-offload", "offload", "mixed")


@dataclass(frozen=True)
class Case:
    """One setting. `layers` cuts the model; 0: all of them. `lengths` are the sequences of one row."""

    shape: str
    layers: int
    quant: str
    lengths: tuple[int, ...]
    rank: int
    dial: str
    compile: bool = False
    stream: str = "off"

    @property
    def name(self) -> str:
        lengths = (
            f"{len(self.lengths)}x{self.lengths[0]}" if len(set(self.lengths)) == 1 else f"{sum(self.lengths)} mixed"
        )
        parts = [self.shape, f"{self.layers or 'all'} layers", self.quant, lengths, f"rank {self.rank}", self.dial]
        return " ".join(parts + ["compiled"] * self.compile + [f"stream {self.stream}"] * (self.stream != "off"))


def gpu_cases() -> list[Case]:
    """Eager settings that run through lengths, ranks and dial for each architecture and precision; some compiled, some
    full models, some rows of several lengths, some streamed."""
    found, at = [], 0
    for shape, layers in (("SmolLM2-135M", 0), ("Llama-3.2-1B", 8), ("Qwen3-4B", 6), ("Llama-3.1-8B", 4)):
        for quant in ("none", "nf4"):
            for lengths in LENGTHS:
                found.append(Case(shape, layers, quant, tuple(lengths), RANKS[at % 5], DIALS[(at + at // 5) % 5]))
                at += 1
            found.append(Case(shape, layers, quant, (900, 1500, 347, 1301), 16, "keep"))
    for dial in ("keep", "recompute", "mixed"):
        found.append(Case("Llama-3.1-8B", 4, "none", (2048,) * 4, 16, dial, True))
    found.append(Case("Llama-3.2-1B", 8, "none", (1024,) * 8, 32, "selective", True))
    found.append(Case("Llama-3.2-1B", 8, "none", (2048,) * 4, 16, "recompute", stream="host"))
    found.append(Case("Qwen3-4B", 6, "none", (4096,) * 2, 64, "recompute-offload", stream="host"))
    found.append(Case("Llama-3.1-8B", 4, "nf4", (2048,) * 4, 16, "recompute", stream="host"))
    for quant, lengths, dial in (
        ("none", (2048,), "keep"), ("none", (2048,) * 4, "recompute"), ("nf4", (2048,), "recompute"),
    ):  # fmt: skip
        found.append(Case("Llama-3.1-8B", 0, quant, lengths, 16, dial))
    order = list(SHAPES)

    def place(case: Case) -> tuple:
        """Cases that share a model stand together; what costs most seconds comes last."""
        full = case.layers == 0 and case.shape != "SmolLM2-135M"
        return order.index(case.shape), full, case.compile, case.stream, case.quant

    return sorted(found, key=place)


def cpu_cases() -> list[Case]:
    lengths = [[64] * 4, [512], [256] * 2, [384, 100, 61, 50], [128], [768]]
    found, at = [], 0
    for shape, layers in (("tiny", 0), ("small", 4), ("qwen-small", 4), ("SmolLM2-135M", 3)):
        for row in lengths:
            dial = ("keep", "recompute", "offload")[(at + at // 3) % 3]
            found.append(Case(shape, layers, "none", tuple(row), RANKS[at % 5], dial))
            at += 1
    return found


def smoke_cases() -> list[Case]:
    tiny = [Case("tiny", 0, "none", (64, 64), 4, dial) for dial in ("keep", "recompute", "offload")]
    return [*tiny, Case("tiny", 0, "none", (64, 64), 4, "recompute", stream="host")]


def config_folder(case: Case) -> str:
    """A directory with the shape's config.json."""
    folder = Path(tempfile.mkdtemp(prefix="veneer-plan-"))
    values = dict(SHAPES[case.shape])
    if case.layers:
        values["num_hidden_layers"] = case.layers
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


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


def step_of(case: Case, model, stack: ExitStack):
    """A training step of this setting, as `veneer bench` makes it."""
    from veneer.config import AdapterConfig, OptimConfig
    from veneer.training.bench import veneer_step

    adapter = AdapterConfig(rank=case.rank, alpha=2 * case.rank)
    train = OptimConfig(
        micro_batch_tokens=sum(case.lengths), checkpointing=case.dial, compile="on" if case.compile else "off",
        cuda_graphs="off",
    )  # fmt: skip
    if case.stream != "off":
        return streamed_step(case, model, adapter, train, stack)
    return veneer_step(model, adapter, train, list(case.lengths), stack)[0]


def streamed_step(case: Case, model, adapter, train, stack: ExitStack):
    """The same over a base whose blocks are in host memory."""
    import numpy as np
    import torch

    from veneer.adapter.attach import attach, get_bank
    from veneer.base.stream_load import Files, stream_model
    from veneer.data.example import TokenizedExample
    from veneer.training.flat import FlatOptimizer
    from veneer.training.streamed import StreamedRows

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = next(model.parameters()).dtype
    model = model.to("cpu")
    torch.cuda.empty_cache() if device.type == "cuda" else None
    stream_model(model, Files(None, {}), device, dtype, None if case.quant == "none" else case.quant)
    model.requires_grad_(False)
    attach(model, adapter, seed=0)
    model.veneer_stream.settle()
    model.train()
    optimizer = FlatOptimizer(get_bank(model).parameters("default"), train)
    rows_of = StreamedRows(model, modes=case.dial, compile=case.compile)
    stack.enter_context(rows_of.attention())
    stack.enter_context(rows_of)
    random = np.random.default_rng(0)
    vocabulary = model.config.vocab_size
    examples = [
        TokenizedExample(random.integers(0, vocabulary, n).astype(np.int32), np.ones(n, bool)) for n in case.lengths
    ]
    rows = rows_of.pack(examples, train.micro_batch_tokens, False)
    supervised = sum(len(row.targets) for row in rows)

    def step() -> float:
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


def predicted(case: Case, rates, cuda: bool, context: float | None = None) -> dict:
    """What the plan says of this setting."""
    from veneer.plan import bytes as size
    from veneer.plan.roofline import step

    tokens, same = sum(case.lengths), len(set(case.lengths)) == 1
    rows = "split" if not cuda else "equal" if same else "mixed"
    about = profile_of(case.shape, case.layers, case.rank, rows, "bfloat16" if cuda else "float32")
    setting = size.Setting(
        quant=case.quant, dial=case.dial, micro_tokens=tokens, sequence=max(case.lengths), tokens=tokens,
        compile=case.compile, stream=case.stream,
    )  # fmt: skip
    need = size.need(about, setting, cuda=cuda, context=context)
    rates = replace(rates, queued=cuda)
    return {"need": need.as_dict(), "time": step(about, setting, rates).as_dict()}


def gpu_worker(cases: list[Case], until: float) -> None:
    """Measure cases of one architecture, one after the other; a line of JSON for each."""
    import torch

    from veneer.adapter.attach import detach
    from veneer.plan.constants import MARGIN
    from veneer.plan.probe import measure

    torch.zeros(1, device="cuda")
    rates = measure(torch.device("cuda"), torch.bfloat16, seconds=0.3)
    free, total = torch.cuda.mem_get_info()
    base, key = None, None
    for case in cases:
        if time.time() > until:
            say(case, {"skipped": "--limit-seconds"})
            continue
        began, record, stack, step = time.time(), {}, ExitStack(), None
        try:
            if (own := (case.layers, case.quant, case.stream)) != key or base is None:
                base = None
                clean()
                base, key = build(case, "cuda"), own
            record |= predicted(case, rates, True)
            clean()
            record["left_over"] = torch.cuda.memory_allocated() - held_bytes(base)
            if record["left_over"] > 16 << 20:  # what an earlier setting left would count as this one's
                raise RuntimeError(f"{record['left_over'] / 1e6:.0f} MB of an earlier setting are still allocated")
            torch.cuda.reset_peak_memory_stats()
            with stack:
                step = step_of(case, base, stack)
                times = []
                for i in range(3):
                    start = time.time()
                    step()
                    torch.cuda.synchronize()
                    times.append(time.time() - start)
                    if i == 0:
                        first = measured_gpu()
                        torch.cuda.reset_peak_memory_stats()
                record["measured"] = measured_gpu() | {
                    "first_step": first, "seconds": statistics.median(times[1:]), "first_seconds": times[0],
                    "tokens_per_second": sum(case.lengths) / statistics.median(times[1:]),
                }  # fmt: skip
                record["measured"]["context"] = total - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
                limit = record["need"]["reserved"] * (1 + MARGIN)
                torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
                clean()
                try:
                    step()
                    record["held"] = True
                except torch.OutOfMemoryError as error:
                    record["held"] = str(error).splitlines()[0][:200]
        except Exception as error:  # noqa: BLE001 recorded, and the next case runs
            record["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        torch.cuda.set_per_process_memory_fraction(1.0)
        step = None
        try:
            detach(base)
        except Exception:  # noqa: BLE001 nothing was attached
            pass
        if case.stream != "off" or "failed" in record:
            base = None
        if case.compile:
            torch._dynamo.reset()
        clean()
        record["rates"], record["wall_seconds"] = rates.as_dict(), round(time.time() - began, 2)
        say(case, record)


def held_bytes(base) -> int:
    """Bytes of a resident model's tensors on the device, each storage once."""
    tensors = [t for t in (*base.parameters(), *base.buffers()) if t.is_cuda]
    states = [getattr(t, "quant_state", None) for t in tensors]
    for state in (s for s in states if s is not None):
        tensors += [t for t in (state.absmax, state.code) if t.is_cuda]
        if state.nested:
            tensors += [t for t in (state.state2.absmax, state.state2.code, state.offset) if t.is_cuda]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measured_gpu() -> dict:
    import torch

    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def clean() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
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


def line_of(record: dict) -> str:
    """One line: predicted and measured, with the error."""
    name = Case(**record["case"]).name
    if "measured" not in record:
        return f"{name:70s} {record.get('failed') or record.get('skipped')}"
    measured, need, parts = record["measured"], record["need"], []
    for key, said in (("allocated", "allocated"), ("reserved", "reserved"), ("rss", "total")):
        if key in measured:
            parts.append(f"{key} {measured[key] / 1e9:.2f} GB ({need[said] / measured[key] - 1:+.1%})")
    speed = record["time"]["tokens_per_second"] / measured["tokens_per_second"] - 1
    parts.append(f"{measured['tokens_per_second']:,.0f} tok/s ({speed:+.0%})")
    return f"{name:70s} {'  '.join(parts)}" + ("" if record.get("held", True) is True else "  OUT OF MEMORY WHEN HELD")


def run_group(cases: list[Case], device: str, until: float, keep, rates: dict | None = None) -> None:
    """Measure cases in a process of their own; if it dies, the case that it died in is recorded and the rest go on."""
    while cases:
        command = [sys.executable, __file__, "--device", device, "--worker", json.dumps([asdict(c) for c in cases])]
        command += ["--until", str(until), "--rates", json.dumps(rates)]
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            done = 0
            for line in child.stdout:
                if line.startswith("RESULT "):
                    keep(json.loads(line.removeprefix("RESULT ")))
                    done += 1
            child.wait()
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:]
        if done < len(cases):
            keep(
                {
                    "case": asdict(cases[done]),
                    "failed": f"the process ended with {child.returncode}: {' '.join(last)[:300]}",
                }
            )
        cases = cases[done + 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--only", help="settings whose name holds this text")
    parser.add_argument("--smoke", action="store_true", help="three tiny settings")
    parser.add_argument("--limit-seconds", type=float, default=600, help="start no further setting after this time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rates", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        cases = [Case(**{**c, "lengths": tuple(c["lengths"])}) for c in json.loads(options.worker)]
        gpu_worker(cases, options.until) if options.device == "cuda" else cpu_worker(
            cases[0], json.loads(options.rates)
        )
        return
    cases = smoke_cases() if options.smoke else gpu_cases() if options.device == "cuda" else cpu_cases()
    cases = [case for case in cases if not options.only or options.only in case.name]
    command = f"python benchmarks/bench_plan.py --device {options.device}" + (" --smoke" if options.smoke else "")
    record: dict = {"command": command, "machine": machine(options.device), "results": []}
    until = time.time() + options.limit_seconds

    def keep(result: dict) -> None:
        record["results"].append(result)
        print(line_of(result), flush=True)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")

    if options.device == "cuda":
        for shape in dict.fromkeys(case.shape for case in cases):
            run_group([case for case in cases if case.shape == shape], "cuda", until, keep)
        return
    for case in cases:
        if time.time() > until:
            keep({"case": asdict(case), "skipped": "--limit-seconds"})
        else:
            run_group([case], "cpu", until, keep, rates_here())


def rates_here() -> dict:
    """The CPU's rates at this moment, on one thread, in seconds of its own work."""
    import torch

    from veneer.plan.probe import measure

    torch.set_num_threads(1)
    return measure(torch.device("cpu"), torch.float32, 0.3, time.process_time).as_dict()


def machine(device: str) -> dict:
    """Said without starting CUDA in this process."""
    import torch
    import transformers

    name = "cpu"
    if device == "cuda":
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
        name = (asked.stdout.strip().splitlines() or ["?"])[0]
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()

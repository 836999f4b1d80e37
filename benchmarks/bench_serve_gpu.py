"""Serving many adapters at once on a GPU: throughput, latency, first tokens of warm and cold adapters.

    python benchmarks/bench_serve_gpu.py --device cuda --out benchmarks/results/serve_gpu.json
    python benchmarks/bench_serve_gpu.py --device cuda --profile --counts 0,1,8,64    # a decoding step, kernel by kernel
    python benchmarks/bench_serve_gpu.py --layers 2 --width 256 --vocabulary 512 --slots 8 --counts 1,4,12 --prompt 16 \
        --new 8 --context 64                                                     # small, on the CPU

Llama-3.1-8B's shapes with random weights in bfloat16, adapters of rank 16 on `--targets` (absent: all seven
projections), as many requests at once as there are slots, each with its own prompt, greedy; adapters are dealt to
requests in turn. Every figure is beside the same engine without adapters. `prompt_tokens_per_s` is of prompts alone, all
slots at once; `bound` is the share of base-only throughput that is left if a step is nothing but reading weights, keys
and values, and each adapter in use once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from veneer.serve import Engine, Registry, Request, Sampling
from veneer.serve.stored import STILL

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
LINEARS += ("mlp.down_proj",)
WARM = 3
"""Steps before those that are timed."""


def build(o: argparse.Namespace) -> torch.nn.Module:
    config = LlamaConfig(
        hidden_size=o.width, intermediate_size=o.width * 7 // 2, num_hidden_layers=o.layers, vocab_size=o.vocabulary,
        num_attention_heads=max(4, o.width // 128), num_key_value_heads=max(1, o.width // 512), head_dim=min(128, o.width // 4),
        max_position_embeddings=8192, eos_token_id=0, bos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(o.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: what ids beyond them mean costs as much to look up as in a real vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={"<end>": 0} | {sign: n for n, sign in enumerate(alphabet, 1)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def write_adapter(folder: Path, model: torch.nn.Module, rank: int, targets: list[str]) -> Path:
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for layer in range(model.config.num_hidden_layers):
        for name in targets:
            path = f"model.layers.{layer}.{name}"
            d_out, d_in = model.get_submodule(path).weight.shape
            key = f"base_model.model.{path}"
            tensors[f"{key}.lora_A.weight"] = (0.01 * torch.randn(rank, d_in, generator=generator)).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (0.01 * torch.randn(d_out, rank, generator=generator)).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [n.split(".")[1] for n in targets],
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def add_copies(registry: Registry, count: int) -> None:
    """More adapters with the factors of the first: other places on the device, and one copy in host memory."""
    first = registry._names["a0"]
    for n in range(1, count):
        content = replace(first, hash=f"copy {n}", on_device=False, users=0)
        registry._names[f"a{n}"] = content
        registry._contents.add(content)


class Bench:
    def __init__(self, o: argparse.Namespace, folder: Path) -> None:
        self.o, self.most = o, max(o.counts)
        self.model = build(o)
        self.registry = Registry(self.model, allowed=[folder], device_slots=max(self.most, o.slots), host_slots=10_000)
        path = write_adapter(folder / "a0", self.model, o.rank, [n for n in LINEARS if n.split(".")[1] in o.targets])
        time.sleep(STILL)  # as files that were not written just now
        self.registry.load("a0", path)
        add_copies(self.registry, self.most + 16)  # some more than the device has room for
        self.engine = Engine(
            self.model, build_tokenizer(), self.registry, slots=o.slots, context=o.context, queue=4 * o.slots
        )
        self.engine.start()
        self.base_bytes = sum(
            p.numel() * p.element_size() for n, p in self.model.named_parameters() if "embed" not in n
        )

    def dealt(self, adapters: int, shift: int = 0) -> list[int]:
        """Which adapter each slot's request has: spread over all of them, others each time."""
        return [(n * max(1, adapters // self.o.slots) + shift) % max(adapters, 1) for n in range(self.o.slots)]

    def place(self, adapters: int) -> None:
        """Bring adapters to the device; only while the engine rests, whose thread does it otherwise."""
        pool = self.engine.runner.pool
        for n in range(adapters):
            pool.release(pool.acquire(self.registry._names[f"a{n}"]))
        wait(self.o)

    def ask(self, n: int, adapter: str | None, new: int, length: int = 0) -> Any:
        generator = torch.Generator().manual_seed(n)
        prompt = torch.randint(1, self.o.vocabulary, (length or self.o.prompt,), generator=generator).tolist()
        sampling = Sampling(new, temperature=0.0, ignore_eos=True)
        return self.engine.submit(Request(prompt, sampling, ((adapter, 1.0),) if adapter else ()))

    def mixed(self, adapters: int, new: int, shift: int = 0) -> dict[str, float]:
        """All slots at once, adapters dealt to them (0: none)."""
        self.engine.slots.forget()
        metrics = self.engine.metrics
        before = metrics.interval.sum, sum(metrics.interval.counts)
        began = time.perf_counter()
        dealt = self.dealt(adapters, shift)
        tickets = [self.ask(n, f"a{a}" if adapters else None, new) for n, a in enumerate(dealt)]
        for ticket in tickets:
            last = [piece for piece in ticket][-1]
            assert last.finish_reason == "length", last
        seconds = time.perf_counter() - began
        interval = (metrics.interval.sum - before[0]) / max(1, sum(metrics.interval.counts) - before[1])
        return {"tokens_per_s": self.o.slots * new / seconds, "ms_between_tokens": 1000 * interval}

    def prompts(self, adapters: int) -> float:
        """Tokens of prompts in a second, all slots at once, each with an answer of one token."""
        self.engine.slots.forget()
        began = time.perf_counter()
        for ticket in [self.ask(n, f"a{a}" if adapters else None, 1) for n, a in enumerate(self.dealt(adapters))]:
            list(ticket)
        return self.o.slots * self.o.prompt / (time.perf_counter() - began)

    def first_token(self, adapter: str | None) -> float:
        self.engine.slots.forget()
        began = time.perf_counter()
        ticket = self.ask(0, adapter, 1)
        for _ in ticket:
            pass
        return 1000 * (time.perf_counter() - began)

    def steps(self, adapters: int, count: int = 30) -> float:
        """Milliseconds of a decoding step by itself, without the host's work, at the last position of a request."""
        runner, at = self.engine.runner, self.o.prompt + self.o.new - 1
        places = {p.content: n for n, p in enumerate(runner.pool.places) if p.content}
        names = [self.registry._names[f"a{n}"] for n in self.dealt(adapters)]
        rows = [(n, at, 1, ((places[names[n]], 1.0),) if adapters else ()) for n in range(self.o.slots)]
        for _ in range(WARM):
            runner.tokens(rows)
        wait(self.o)
        began = time.perf_counter()
        for _ in range(count):
            runner.tokens(rows)
        wait(self.o)
        return 1000 * (time.perf_counter() - began) / count

    def bound(self, adapters: int) -> float:
        config, o = self.model.config, self.o
        heads = 2 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        cache = o.slots * (o.prompt + o.new / 2) * heads
        used = min(adapters, o.slots) * self.registry.info("a0").bytes
        return (self.base_bytes + cache) / (self.base_bytes + cache + used)


def wait(o: argparse.Namespace) -> None:
    if o.device.startswith("cuda"):
        torch.cuda.synchronize()


def throughput(bench: Bench, count: int) -> dict[str, Any]:
    bench.place(count)
    bench.mixed(0, 4), bench.mixed(count, 4)  # whatever is still to be captured, compiled and allocated
    base, mixed = [], []
    for shift in range(bench.o.repeats):
        base.append(bench.mixed(0, bench.o.new))
        mixed.append(bench.mixed(count, bench.o.new, shift))
    middle = lambda runs, key: statistics.median(run[key] for run in runs)  # noqa: E731
    prompts = [[bench.prompts(n) for n in (count, 0)] for _ in range(3)]
    step, plain = bench.steps(count), bench.steps(0)
    return {
        "adapters": count,
        "tokens_per_s": round(middle(mixed, "tokens_per_s"), 1),
        "base_tokens_per_s": round(middle(base, "tokens_per_s"), 1),
        "share_of_base": round(middle(mixed, "tokens_per_s") / middle(base, "tokens_per_s"), 3),
        "ms_between_tokens": round(middle(mixed, "ms_between_tokens"), 3),
        "base_ms_between_tokens": round(middle(base, "ms_between_tokens"), 3),
        "prompt_tokens_per_s": round(statistics.median(mine for mine, _ in prompts)),
        "base_prompt_tokens_per_s": round(statistics.median(base for _, base in prompts)),
        "step_ms": round(step, 3),
        "base_step_ms": round(plain, 3),
        "step_share_of_base": round(plain / step, 3),
        "bound": round(bench.bound(count), 3),
    }


def profile(bench: Bench, count: int) -> dict[str, Any]:
    """A decoding step by itself, and what its time goes to: kernels (milliseconds, launches) of one step."""
    bench.place(count)
    step, steps = bench.steps(count), 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        bench.steps(count, steps)
    found: dict[str, list[float]] = {}
    for event in record.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernel = found.setdefault(event.name[:60], [0.0, 0])
            kernel[0] += event.device_time / 1000 / (steps + WARM)
            kernel[1] += 1 / (steps + WARM)
    largest = sorted(found.items(), key=lambda item: -item[1][0])
    return {
        "adapters": count,
        "step_ms": round(step, 3),
        "kernels_ms": round(sum(ms for ms, _ in found.values()), 3),
        "launches": round(sum(launches for _, launches in found.values())),
        "largest": {name: [round(ms, 4), round(launches, 1)] for name, (ms, launches) in largest[:14]},
    }


def cold(bench: Bench) -> dict[str, Any]:
    """First token of one request alone: an adapter on the device, one in host memory, one on disk; the base."""
    bench.first_token("a0"), bench.first_token(None)
    base = [bench.first_token(None) for _ in range(5)]
    warm = [bench.first_token("a0") for _ in range(5)]
    host = [bench.first_token(f"a{bench.most + n}") for n in range(5)]  # never asked for before
    disk, content = [], bench.registry._names["a0"]
    for n in range(3):
        name = f"a{bench.most + 5 + n}"
        other = bench.registry._names[name]
        other.host, other.hash = None, content.hash  # as the tier below host leaves it; read from a0's files
        disk.append(bench.first_token(name))
        other.host = None  # its memory is the next one's, as where the host tier is full
    there = [name for name, content in bench.registry._names.items() if content.on_device]
    busy = [bench.ask(n, there[n % len(there)], bench.o.new) for n in range(bench.o.slots // 2)]
    streams = [iter(ticket) for ticket in busy]
    for stream in streams:
        next(stream)  # while prompts are being read, everyone waits for them
    under_load = {"warm": bench.first_token("a0"), "cold": bench.first_token(f"a{bench.most + 8}")}
    for stream in streams:
        list(stream)
    figures = {"base": statistics.median(base), "disk_first": disk[0]}
    figures |= {"warm": statistics.median(warm), "host": statistics.median(host), "disk": statistics.median(disk)}
    figures |= {f"{key}_under_load": value for key, value in under_load.items()}
    return {f"first_token_ms_{key}": round(value, 2) for key, value in figures.items()} | {
        "cold_minus_warm_ms": round(figures["host"] - figures["warm"], 2),
        "disk_minus_warm_ms": round(figures["disk"] - figures["warm"], 2),
    }


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """What the targets are about: shares of base-only throughput, tokens' pace with many adapters over few, a cold start."""
    ran = {case["adapters"]: case for case in cases if "adapters" in case}
    pace = [ran[count]["ms_between_tokens"] for count in sorted(ran) if count >= 8]
    cold = [case["cold_minus_warm_ms"] for case in cases if "cold_minus_warm_ms" in case]
    return {
        "share_of_base": {count: case["share_of_base"] for count, case in ran.items()},
        "step_share_of_base": {count: case["step_share_of_base"] for count, case in ran.items()},
        "ms_between_tokens_most_over_8": round(pace[-1] / pace[0], 3) if len(pace) > 1 else None,
        "cold_minus_warm_ms": cold[0] if cold else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", type=lambda text: text.split(","), default=[n.split(".")[1] for n in LINEARS])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--counts", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64, 512])
    parser.add_argument("--profile", action="store_true", help="decoding steps alone, and their kernels")
    parser.add_argument("--limit-seconds", type=float, default=80)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    if o.profile and not o.device.startswith("cuda"):
        parser.error("--profile is of a GPU's kernels: give --device cuda")
    began = time.perf_counter()
    name = torch.cuda.get_device_name(0) if o.device.startswith("cuda") else "cpu"
    record: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "options": vars(o) | {"out": None},
        "cases": [],
    }

    def note(case: dict[str, Any]) -> None:
        record["cases"].append(case | {"at_s": round(time.perf_counter() - began, 1)})
        print(json.dumps(record["cases"][-1]), flush=True)
        if o.out:
            o.out.write_text(json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(o, Path(folder))
        note({"case": "ready", "adapter_mib": round(bench.registry.info("a0").bytes / 2**20, 1)})
        bench.first_token(None)
        note({"case": "prepared"})  # kernels compiled, graphs captured
        measure = profile if o.profile else throughput
        jobs = [(f"{count} adapters", lambda count=count: measure(bench, count)) for count in o.counts]
        if not o.profile:
            jobs.insert(0, ("cold", lambda: cold(bench)))  # while places are empty
        for case, job in jobs:
            if time.perf_counter() - began > o.limit_seconds:
                note({"case": case, "error": "no time left"})
                continue
            try:
                note({"case": case} | job())
            except Exception as error:  # the other cases are wanted all the same
                note({"case": case, "error": f"{type(error).__name__}: {error}"[:500]})
        if not o.profile:
            note({"case": "summary"} | summary(record["cases"]))
        if o.device.startswith("cuda"):
            note({"case": "memory", "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
                  "graphs": sorted(kind.__name__ for kind in getattr(bench.engine.runner, "captures", ()))})  # fmt: skip
        bench.engine.shutdown(1)


if __name__ == "__main__":
    main()

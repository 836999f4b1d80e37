"""Many adapters in one pass against one after another, both with Veneer itself.

    python benchmarks/bench_sweep.py --out benchmarks/results/sweep_cpu.json          SmolLM2-135M on a CPU, K = 4
    python benchmarks/bench_sweep.py --gpu --out benchmarks/results/sweep_gpu.json    8B shape on a GPU, K = 8
    python benchmarks/bench_sweep.py --gpu --smoke --out sweep_smoke.json             the same script, a tiny shape

CPU: a sweep of K learning rates and seeds through `Sweep`, once with K at a time and once with one at a time, every step
whole (data, passes, update, metrics), without loading the base; repeated in turns, medians of wall and of processor time.
"short" are prompts of about 15 tokens, "bundled" the bundled data of about 118 tokens an example; "upper" adapts the upper
third of the blocks only, on the same data in the same order, so that the lower ones run once. GPU: steps of a `Pool` on
random tokens and random weights, K adapters of rank 16 on all seven projections, 512 tokens each; "together" is one pass
of all, "one by itself" the step of one adapter, which one after another take. Uncompiled cases come first; each is saved
when it is through, and --limit-seconds ends the one that it finds in work.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
SHAPES = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False),
}  # fmt: skip


def save(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "transformers", "veneer")}
    return {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()} | found


CPU_CASES = {
    "short, batch 1": ("short", 1, {}),
    "short, batch 2": ("short", 2, {}),
    "short, batch 4": ("short", 4, {}),
    "bundled, batch 1": ("bundled", 1, {}),
    "bundled, batch 1, upper": ("bundled", 1, {"adapter.layers": list(range(20, 30))}),
}


def cpu(args: argparse.Namespace) -> None:
    """Adapters·tokens/s of K at a time over one at a time."""
    import torch

    torch.set_num_threads(args.threads)
    result = {"command": "python " + " ".join(sys.argv), "machine": machine(), "threads": args.threads, "cases": {}}
    for name, (data, batch, settings) in CPU_CASES.items():
        if args.only and name not in args.only:
            continue
        runs: dict[str, list[dict[str, float]]] = {"together": [], "one after another": []}
        for number in range(args.repeats):
            for side in list(runs) if number % 2 == 0 else list(runs)[::-1]:
                at_once = args.adapters if side == "together" else 1
                runs[side].append(one_sweep(args, data, batch, settings, at_once))
        medians = {
            side: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for side, found in runs.items()
        }
        a, b = medians["together"], medians["one after another"]
        result["cases"][name] = {
            "adapters": args.adapters, "batch_size": batch, "tokens_per_step": a["tokens"] / args.adapters / args.steps,
            "speedup": a["adapter_tokens_per_second"] / b["adapter_tokens_per_second"],
            "speedup_in_cpu_time": b["cpu_seconds"] / a["cpu_seconds"], "medians": medians, "runs": runs,
        }  # fmt: skip
        speedups = (result["cases"][name][key] for key in ("speedup", "speedup_in_cpu_time"))
        print("{}: {:.2f}x, in CPU time {:.2f}x".format(name, *speedups), flush=True)
        save(args.out, result)


def short_data(folder: Path) -> Path:
    """Sums of small numbers as prompts and completions."""
    rows = [
        {"prompt": f"What is {a} plus {b}?", "completion": f" {a + b}."} for a in range(3, 40) for b in range(5, 30)
    ]
    path = folder / "short.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one_sweep(args: argparse.Namespace, data: str, batch: int, settings: dict, at_once: int) -> dict[str, float]:
    """One sweep; the time of its steps, the first of each trial left out (it allocates)."""
    from veneer.training import sweep as module
    from veneer.training.sweep import Sweep, SweepOptions
    from veneer.training.trials import named_trials

    folder = Path(tempfile.mkdtemp())
    same = "adapter.layers" in settings
    values = {
        "model": args.model, "data": str(short_data(folder)) if data == "short" else data, "device": "cpu",
        "train": {"batch_size": batch, "max_steps": args.steps + 1, "save_every": 10**6},
    }  # fmt: skip
    own = [{"train.lr": 1e-4 * (i + 1), "seed": 0 if same else i} | settings for i in range(args.adapters)]
    tokens, marks = [], []

    class Watched(module.Pool):
        """The pool with a clock around its steps, without what leaving adapters write."""

        def _step(self):
            first = self.lanes[0].state.step == 0
            began = time.perf_counter(), time.process_time()
            failed = super()._step()
            if not first:
                marks.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            return failed

    plain, module.Pool = module.Pool, Watched
    try:
        observe = lambda r: tokens.append(r["tokens"]) if r["type"] == "train" and r["step"] > 1 else None  # noqa: E731
        Sweep(folder / "sweep", values, named_trials(own), SweepOptions(at_once=at_once), observe=observe).run()
    finally:
        module.Pool = plain
        shutil.rmtree(folder)
    seconds, cpu_seconds = (sum(part) for part in zip(*marks))
    speed = sum(tokens) / seconds
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": sum(tokens), "adapter_tokens_per_second": speed}


class Fake:
    """In a tokenizer's place: the data are token ids."""

    chat_template = None

    def decode(self, ids):
        return ""


def gpu(args: argparse.Namespace) -> None:
    """K adapters in one pass and one adapter by itself, compiled and not."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape, tokens = ("tiny", 16) if args.smoke else ("8B", 512)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    config = LlamaConfig(rope_theta=500000.0, max_position_embeddings=131072, **SHAPES[shape])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result = {
        "command": "python " + " ".join(sys.argv), "machine": machine() | {"device": name}, "shape": shape,
        "adapters": args.adapters, "tokens_each": tokens, "base_bytes": _allocated(device), "cases": {},
    }  # fmt: skip
    signal.signal(signal.SIGALRM, _time_is_up)
    for case, (count, options) in gpu_cases(args.adapters, device.type == "cuda").items():
        left = args.limit_seconds - (time.monotonic() - began)
        if left <= 0:
            result["cases"][case] = {"left_out": "the time was up"}
            continue
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            result["cases"][case] = steps_of(model, count, tokens, options, args, result["base_bytes"])
        except TimeUp:
            result["cases"][case] = {"left_out": f"not through in the {left:.0f} s that were left"}
        except Exception as error:
            result["cases"][case] = {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(case, {k: v for k, v in result["cases"][case].items() if k not in ("steps", "trace")}, flush=True)
        summarise(result, args.adapters)
        save(args.out, result)
    result["seconds"] = time.monotonic() - began
    save(args.out, result)


def gpu_cases(adapters: int, cuda: bool) -> dict[str, tuple[int, dict[str, str]]]:
    """How many adapters each case has, and its settings; those that take longest last."""
    plain = {"compile": "off"}
    cases = {"one by itself, uncompiled": (1, plain), "together, uncompiled": (adapters, plain)}
    if cuda:
        cases |= {
            "one by itself": (1, {}),
            "together": (adapters, {}),
            "one by itself, no CUDA graphs": (1, {"cuda_graphs": "off"}),
        }
    return cases


class TimeUp(BaseException):
    """The time is up. Not an `Exception`: the compiler would take it for a failure of its own and go on."""


def _time_is_up(*_: Any) -> None:
    raise TimeUp


def steps_of(
    model: Any, count: int, tokens: int, settings: dict, args: argparse.Namespace, base: int
) -> dict[str, Any]:
    """Times and memory of the steps of `count` adapters.

    "setup_seconds" is all before the first step, "compile_seconds" what the first two steps took beyond the median step:
    nearly all of it compilation, where blocks are compiled and the settings did not already compile them in the setup.
    """
    import numpy as np
    import torch

    from veneer.adapter.attach import detach
    from veneer.base.fingerprint import fingerprint
    from veneer.config import TrainConfig
    from veneer.data.example import TokenizedExample
    from veneer.data.prepare import Counts
    from veneer.training.many import Lane, Pool
    from veneer.training.setup import Setup

    device, folder = next(model.parameters()).device, Path(tempfile.mkdtemp())
    record = {"name_or_path": "random", "quant": None, "fingerprint": fingerprint(model).as_dict()}
    times, notes, pool, lanes, began_at = [], [], None, [], time.perf_counter()
    options = {"batch_size": 1, "micro_batch_tokens": tokens * count, "save_every": 10**6} | settings
    try:
        with Pool(model, note=notes.append) as pool:
            for i in range(count):
                random = np.random.default_rng(i)
                data = [
                    TokenizedExample(
                        random.integers(0, model.config.vocab_size, tokens).astype(np.int32), np.ones(tokens, bool)
                    )
                    for _ in range(16)
                ]
                config = TrainConfig(
                    data="x", out=str(folder / f"{i}"), seed=i, adapter={"rank": 16}, train=options | {"epochs": 100}
                )
                lane = Lane(config, f"lane{i}", Setup(model, Fake(), data, None, "x", {"train": Counts()}, record),
                            lambda r: notes.append(r["text"]) if r["type"] == "note" else None, alone=count == 1)  # fmt: skip
                if reason := pool.add(lane, resume=False):
                    raise RuntimeError(reason)
                lanes.append(lane)
            states, setup_seconds = 16 * lanes[0].report.trainable_parameters, time.perf_counter() - began_at
            for number in range(2 + args.steps):
                if number == 2 and device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                _wait(device)
                began = time.perf_counter()
                pool.tick()
                _wait(device)
                times.append(time.perf_counter() - began)
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            losses = [lane.loss for lane in lanes]
    finally:
        for lane in lanes:
            lane.metrics.close()
        shutil.rmtree(folder)
        if lanes:
            detach(model)
        del lanes, pool
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    median = statistics.median(times[2:])
    return {
        "step_seconds": median, "setup_seconds": setup_seconds, "first_step_seconds": times[0],
        "compile_seconds": sum(times[:2]) - 2 * median, "adapter_tokens_per_second": count * tokens / median,
        "peak_bytes": peak, "state_bytes_each": states, "activation_bytes": max(0, peak - base - count * states),
        "last_losses": losses, "notes": [n for n in notes if "compil" in n or n.startswith("warning")], "steps": times,
    }  # fmt: skip


def summarise(result: dict[str, Any], count: int) -> None:
    """The ratios, where both sides are there: each way's own, and the best of each."""
    rates = {n: c["adapter_tokens_per_second"] for n, c in result["cases"].items() if "step_seconds" in c}
    single, joint = ([rate for n, rate in rates.items() if n.startswith(start)] for start in ("one", "together"))
    if single and joint:
        result["speedup"] = max(joint) / max(single)
        fastest = max((c for n, c in result["cases"].items() if n in rates and n.startswith("together")),
                      key=lambda c: c["adapter_tokens_per_second"])  # fmt: skip
        alone = max((c for n, c in result["cases"].items() if n in rates and n.startswith("one")),
                    key=lambda c: c["adapter_tokens_per_second"])  # fmt: skip
        limit = result["base_bytes"] + count * (alone["state_bytes_each"] + alone["activation_bytes"])
        result["peak_over_limit"] = fastest["peak_bytes"] / limit if limit else None


def _allocated(device: Any) -> int:
    import torch

    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpu", action="store_true", help="the 8B shape on a GPU")
    parser.add_argument("--smoke", action="store_true", help="with --gpu: a tiny shape, on whatever there is")
    parser.add_argument("--adapters", type=int, help="K: 4, or 8 with --gpu")
    parser.add_argument("--only", nargs="+", choices=CPU_CASES, help="these cases of the CPU")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; more than are idle make times meaningless")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--limit-seconds", type=float, default=80.0, help="of all GPU cases together")
    args = parser.parse_args()
    args.adapters = args.adapters or (8 if args.gpu else 4)
    gpu(args) if args.gpu else cpu(args)

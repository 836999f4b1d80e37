"""Many adapters in one pass against one after another, both with Veneer itself.

    python benchmarks/bench_sweep.py --out benchmarks/results/sweep_cpu.json          SmolLM2-135M on a CPU, K = 4
    python benchmarks/bench_sweep.py --gpu --out benchmarks/results/sweep_gpu.json    8B shape on a GPU, K = 8
    python benchmarks/bench_sweep.py --gpu --smoke --out sweep_smoke.json             the same script, a tiny shape

CPU: runs of the bundled data through `Sweep`, once with K at a time and once with one at a time, everything that a run
does included but for loading the base; repeated in turns, medians of wall and of processor time. GPU: steps on random
tokens and random weights, K adapters of rank 16 on all seven projections, 512 tokens each; "together" is one pass of all,
"one after another" is the step that `veneer bench` measures, K times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
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


def cpu(args: argparse.Namespace) -> dict[str, Any]:
    """Adapters·tokens/s of K at a time over one at a time, for several batch sizes."""
    import torch

    torch.set_num_threads(args.threads)
    result = {"command": "python " + " ".join(sys.argv), "machine": machine(), "threads": args.threads, "cases": {}}
    for batch in args.batch_sizes:
        runs: dict[str, list[dict[str, float]]] = {"together": [], "one after another": []}
        for number in range(args.repeats):
            order = list(runs) if number % 2 == 0 else list(runs)[::-1]
            for side in order:
                at_once = args.adapters if side == "together" else 1
                runs[side].append(one_sweep(args, batch, at_once))
                print(f"batch {batch} {side}: {runs[side][-1]}", flush=True)
        medians = {
            side: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for side, found in runs.items()
        }
        a, b = medians["together"], medians["one after another"]
        case = {
            "batch_size": batch, "adapters": args.adapters, "steps": args.steps, "medians": medians, "runs": runs,
            "speedup": a["adapter_tokens_per_second"] / b["adapter_tokens_per_second"],
            "speedup_in_cpu_time": b["cpu_seconds"] / a["cpu_seconds"],
        }  # fmt: skip
        result["cases"][f"batch {batch}"] = case
        print(f"batch {batch}: {case['speedup']:.2f}x, in CPU time {case['speedup_in_cpu_time']:.2f}x", flush=True)
        save(args.out, result)
    return result


def one_sweep(args: argparse.Namespace, batch: int, at_once: int) -> dict[str, float]:
    """One sweep over learning rates; seconds from the first step's beginning to the last step's end."""
    from veneer.training import sweep as module
    from veneer.training.sweep import Sweep, SweepOptions
    from veneer.training.trials import named_trials

    folder = Path(tempfile.mkdtemp())
    values = {
        "model": args.model, "data": "bundled", "out": str(folder / "sweep"), "device": "cpu",
        "train": {"batch_size": batch, "max_steps": args.steps, "save_every": 10**6},
    }  # fmt: skip
    trials = named_trials([{"train.lr": 1e-4 * (i + 1), "seed": i} for i in range(args.adapters)])
    tokens, marks = 0, []

    def observe(record: dict) -> None:
        nonlocal tokens
        if record["type"] == "train":
            tokens += record["tokens"]

    class Watched(module.Pool):
        """The pool with a clock around its steps: what loading the base and attaching take is left out."""

        def tick(self):
            began = time.perf_counter(), time.process_time()
            gone = super().tick()
            marks.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            return gone

    plain, module.Pool = module.Pool, Watched
    try:
        Sweep(folder / "sweep", values, trials, SweepOptions(at_once=at_once), observe=observe).run()
    finally:
        module.Pool = plain
        shutil.rmtree(folder)
    seconds, cpu_seconds = (sum(part) for part in zip(*marks))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": tokens,
        "adapter_tokens_per_second": tokens / seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpu", action="store_true", help="the 8B shape on a GPU")
    parser.add_argument("--smoke", action="store_true", help="with --gpu: a tiny shape, on whatever there is")
    parser.add_argument("--adapters", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--limit-seconds", type=float, default=90.0)
    args = parser.parse_args()
    args.adapters = args.adapters or (8 if args.gpu else 4)
    cpu(args)

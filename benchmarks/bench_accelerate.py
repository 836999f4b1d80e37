"""veneer.accelerate against the same PEFT model left alone: step time and peak memory, in the same run.

    python benchmarks/bench_accelerate.py [--steps 5] [--batch 2] [--length 256] [--dtype float32] [--dropout 0] [--dora]
                                          [--device cpu] [--out benchmarks/results/accelerate.json]
    python benchmarks/bench_accelerate.py --model random-1b --device cuda --dtype bfloat16 --batch 8 --length 1024

SmolLM2-135M-Instruct (or random weights of Llama 1B's shapes), rank 16, all linears, AdamW, random tokens. Three
variants: PEFT as it is, PEFT with its cast of inputs switched off (`peft.helpers.disable_input_dtype_casting`; the same
thing in float32, and no DoRA), and accelerated. Each runs in processes of its own, in turn, `--rounds` times; a step's
time is the median of all steps after the first of each process, and the memory is the highest of the process (CPU,
loading included) or of the allocator (CUDA).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

VARIANTS = ("peft", "peft_no_cast", "accelerated")


def measure(args: argparse.Namespace) -> dict:
    import peft
    import torch

    import veneer

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = load(args).requires_grad_(False)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=args.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    config.use_dora = args.dora
    model = peft.get_peft_model(model, config).train()
    if args.variant == "accelerated":
        print(veneer.accelerate(model), file=sys.stderr)
    uncast = peft.helpers.disable_input_dtype_casting if args.variant == "peft_no_cast" else contextlib.nullcontext
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds, losses = [], []
    is_cuda = args.device != "cpu"
    for _ in range(args.steps):
        ids = torch.randint(1, 49000, (args.batch, args.length)).to(args.device)
        began = time.perf_counter()
        with uncast(model):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    scale = 2**20 if sys.platform == "linux" else 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    if is_cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": seconds[1:], "peak_gib": peak, "losses": losses, "device": device_name(args.device)}


def load(args: argparse.Namespace):
    import torch

    import veneer

    if args.model != "random-1b":
        return veneer.load_base(args.model)[0].to(args.device, getattr(torch, args.dtype))
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    config = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=50000, dtype=args.dtype)
    with torch.device(args.device):
        return LlamaForCausalLM(config).to(getattr(torch, args.dtype))


def device_name(device: str) -> str:
    import torch

    return platform.machine() if device == "cpu" else torch.cuda.get_device_name()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="or random-1b: Llama 1B's shapes")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accelerate.json"))
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args)))
        return
    variants = [v for v in VARIANTS if v != "peft_no_cast" or (args.dtype != "float32" and not args.dora)]
    runs = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant in variants:
            command = [sys.executable, __file__, "--variant", variant, *sys.argv[1:]]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[variant].append(json.loads(done.stdout.strip().splitlines()[-1]))
    sides = {
        variant: {
            "step_seconds": statistics.median(s for run in found for s in run["seconds"]),
            "step_seconds_least": min(s for run in found for s in run["seconds"]),
            "peak_gib": max(run["peak_gib"] for run in found),
            "losses": found[0]["losses"],
        }
        for variant, found in runs.items()
    }
    ours = sides["accelerated"]
    result = sides | {
        "time_ratio": {v: ours["step_seconds"] / sides[v]["step_seconds"] for v in variants[:-1]},
        "memory_ratio": {v: ours["peak_gib"] / sides[v]["peak_gib"] for v in variants[:-1]},
        "machine": {"device": runs["peft"][0]["device"], "cores": os.cpu_count(), "threads": args.threads}
        | {name: version(name) for name in ("torch", "transformers", "peft")},
        "command": "python " + " ".join(sys.argv),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

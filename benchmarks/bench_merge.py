"""Merging an adapter into a checkpoint: memory and speed beside a plain copy of the same bytes, and beside PEFT.

    python benchmarks/bench_merge.py --folder /tmp/merge --out benchmarks/results/merge.json

Makes a checkpoint of Llama-3.1-8B's shapes (random bfloat16 weights) and a rank-16 adapter on all its linears. Each merge and
each copy is a process of its own, one after the other in turn, so that what else the machine does meets both: the share of
the copy's speed is the median over such pairs. Both end with fsync. Merges check rows as `veneer merge` does. PEFT needs the
whole model in memory and gets a model of fewer layers, with a merge of the same beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "max_position_embeddings": 8192,
}
SHARD = 2e9


def make(folder: Path, layers: int) -> None:
    """The checkpoint and its adapter."""
    import torch
    from transformers import LlamaConfig

    import veneer
    from veneer.base.checkpoint import INDEX, write_tensors
    from veneer.base.mapped import empty_model

    base = folder / "base"
    base.mkdir(parents=True)
    options = {"num_hidden_layers": layers, "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(**LLAMA_8B, **options).save_pretrained(base)
    model = empty_model(base)
    torch.manual_seed(0)
    pool = (torch.randn(1 << 22) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy()

    shards: list[dict] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        if size + 2 * parameter.numel() > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = ("BF16", tuple(parameter.shape))
        size += 2 * parameter.numel()
    where = {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(entries, file)

        def pieces(name: str, entries: dict = entries):
            left = 2 * torch.Size(entries[name][1]).numel()
            while left:
                yield pool[: min(left, len(pool))]
                left -= min(left, len(pool))

        write_tensors(base / file, entries, {"format": "pt"}, pieces)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    from veneer.base.checkpoint import open_checkpoint
    from veneer.base.mapped import map_model

    model, _ = map_model(open_checkpoint(base), base)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=16, alpha=32, target_modules="all-linear"), seed=0)
    for name, parameter in bank.parameters("default").items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.01)
    veneer.save_adapter(model, folder / "adapter")


def measured(what: str, folder: Path, out: Path, threads: int) -> dict:
    """Run one of `PARTS` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--part",
        what,
        "--folder",
        str(folder),
        "--to",
        str(out),
        "--threads",
        str(threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    shutil.rmtree(out, ignore_errors=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def copy(folder: Path, out: Path) -> None:
    out.mkdir()
    for file in (folder / "base").iterdir():
        shutil.copyfile(file, out / file.name)
        handle = os.open(out / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def merge(folder: Path, out: Path) -> None:
    from veneer.formats.merge_stream import merge_checkpoint

    report = merge_checkpoint(folder / "adapter", folder / "base", out)
    assert report.rows, report


def peft(folder: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(out, max_shard_size="2GB")


PARTS = {"copy": copy, "merge": merge, "peft": peft}


def run_part(what: str, folder: Path, out: Path, threads: int) -> None:
    if what != "copy":  # imports take seconds whatever the model's size
        import peft  # noqa: F401
        import torch
        from transformers import LlamaForCausalLM  # noqa: F401

        import veneer.formats.merge_stream  # noqa: F401

        torch.set_num_threads(threads)
    begin, busy = time.perf_counter(), time.process_time()
    PARTS[what](folder, out)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    size = sum(file.stat().st_size for file in out.iterdir())
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's peak
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    print(
        json.dumps(
            {
                "seconds": round(seconds, 2),
                "cpu_seconds": round(busy, 2),
                "MB_per_s": round(size / seconds / 1e6),
                "peak_GB": round(peak / 1e9, 2),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32, help="Of the merge beside a copy.")
    parser.add_argument("--peft-layers", type=int, default=4, help="Of the merge beside PEFT's.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    if args.part:
        return run_part(args.part, args.folder, args.to, args.threads)
    found = {
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "load": os.getloadavg()},
        "threads": args.threads,
    }
    for layers, parts in ((args.layers, ["copy", "merge"]), (args.peft_layers, ["merge", "peft"])):
        folder = args.folder / f"{layers}-layers"
        try:
            if not (folder / "adapter").exists():
                make(folder, layers)
            size = sum(file.stat().st_size for file in (folder / "base").iterdir())
            rows = {part: [] for part in parts}
            for _ in range(args.repeats):
                for part in parts:
                    rows[part].append(measured(part, folder, folder / "out", args.threads))
                    print(layers, part, rows[part][-1], flush=True)
            found[f"{layers} layers"] = {"GB": round(size / 1e9, 2), **rows}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    pairs = zip(*(found[f"{args.layers} layers"][part] for part in ("merge", "copy")))
    shares = [copied["seconds"] / merged["seconds"] for merged, copied in pairs]
    found["merge_share_of_copy_speed"] = {"median": round(median(shares), 3), "pairs": [round(s, 3) for s in shares]}
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

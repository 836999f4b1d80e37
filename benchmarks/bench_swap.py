"""How long a live adapter takes to become another one: swap in place, adding the n-th adapter, adding and removing.

    python benchmarks/bench_swap.py --device cuda                # Llama-3.1-8B's shapes, bfloat16
    python benchmarks/bench_swap.py --layers 2 --width 512       # small, on the CPU

Random weights; rank 16 on all seven projections; factors in float32. A swap is one copy from pinned host memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from veneer.adapter.slot import prepare, swap


def build(options: argparse.Namespace) -> torch.nn.Module:
    width = options.width
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=options.layers, vocab_size=1024,
        num_attention_heads=width // 128, num_key_value_heads=max(1, width // 512),
    )  # fmt: skip
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = build(options)
    config = veneer.AdapterConfig(rank=16, alpha=32)
    bank = veneer.attach(model, config, name="slot", seed=0)
    slot = veneer.reserve(bank, "slot", 16)
    source = {p: (layer.lora_A["slot"].cpu(), layer.lora_B["slot"].cpu(), 0.5) for p, layer in bank.layers.items()}

    def wait() -> None:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()

    def timed(call) -> float:
        wait()
        began = time.perf_counter()
        call()
        wait()
        return 1000 * (time.perf_counter() - began)

    ready = prepare(bank, "slot", source)
    swaps = [timed(lambda: swap(bank, "slot", ready)) for _ in range(30)]
    preparing = [timed(lambda: prepare(bank, "slot", source)) for _ in range(3)]
    adding = [timed(lambda n=n: veneer.attach(model, config, name=f"n{n}")) for n in range(options.adapters)]
    record = {
        "device": torch.cuda.get_device_name(0) if options.device.startswith("cuda") else "cpu",
        "adapter_mib": round(slot.bytes / 2**20, 1),
        "swap_ms": round(statistics.median(swaps), 2),
        "prepare_ms": round(statistics.median(preparing), 1),
        "add_first_ms": round(statistics.median(adding[:5]), 1),
        "add_last_ms": round(statistics.median(adding[-5:]), 1),
        "adapters": options.adapters,
    }
    if options.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        for name in bank.names[1:]:
            bank.remove(name)
        wait()
        record["freed_mib"] = round((before - torch.cuda.memory_allocated()) / 2**20)
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

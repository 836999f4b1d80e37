"""How the shrink and expand kernels of a served step are best cut into programs: Llama-3.1-8B's shapes, under CUDA graphs.

    python benchmarks/bench_serve_kernels.py --out serve_kernels.json
    python benchmarks/bench_serve_kernels.py --smoke                        # small, on the CPU, the twins

Times all blocks' shrinks and all blocks' expands of one step, for several numbers of different adapters in the batch (0:
launches alone) and several sizes, one changed at a time. Figures are of a whole step: milliseconds, and GB/s of the
factors of the adapters in use.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.kernels import served
from veneer.kernels.served import ROWS, SIZES, Sizes

SHAPES = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
"""(I, O of each target) of a block's groups."""
CHANGES = {
    "shrink": [{}, *({"share": n << 10} for n in (16, 64)), *({"stage": n << 10} for n in (8, 32)),
               *({"shrink_warps": n} for n in (2, 8)), *({"stages": n} for n in (2, 4))],
    "expand": [{}, *({"columns": n} for n in (128, 256)), *({"expand_warps": n} for n in (2, 8)),
               {"columns": 256, "expand_warps": 2}, {"columns": 1024, "stage": 32768, "expand_warps": 8}],
}  # fmt: skip


class Block:
    """One group of one block: factors at P places, an input and outputs."""

    def __init__(self, d_in: int, d_outs: tuple[int, ...], o: argparse.Namespace) -> None:
        make = lambda *shape: torch.empty(shape, dtype=o.dtype, device=o.device).normal_(0, 0.01)  # noqa: E731
        self.x, self.A = make(o.rows, d_in), make(o.rows, d_in, len(d_outs) * o.rank)
        self.B, self.y = [make(o.rows, o.rank, w) for w in d_outs], [make(o.rows, w) for w in d_outs]

    def bytes_per_adapter(self, kind: str) -> int:
        return sum(t[0].numel() * t.element_size() for t in ([self.A] if kind == "shrink" else self.B))


def milliseconds(run: Callable[[], None], device: str) -> float:
    """Of one run, captured where there is a GPU; the median of five."""
    run()  # compiles
    if device == "cpu":
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(), graph.replay(), end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[2]


def measure(kind: str, sizes: Sizes, blocks: list[Block], tiles: Tensor, weights: Tensor, device: str) -> float:
    hidden = [served.shrink(b.x, b.A, tiles, sizes) for b in blocks] if kind == "expand" else []

    def run() -> None:
        if kind == "shrink":
            for b in blocks:
                served.shrink(b.x, b.A, tiles, sizes)
        for h, b in zip(hidden, blocks):
            served.expand(h, b.B, tiles, weights, b.y, sizes)

    return milliseconds(run, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--counts", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 8, 64])
    parser.add_argument("--limit-seconds", type=float, default=55)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    o.device, o.dtype = ("cpu", torch.float32) if o.smoke else ("cuda", torch.bfloat16)
    if o.smoke:
        o.layers, o.rows, o.counts = 1, 8, [0, 1, 8]
    began, shrunk = time.perf_counter(), 64 if o.smoke else 1
    shapes = [(i // shrunk, tuple(w // shrunk for w in widths)) for i, widths in SHAPES]
    blocks = [Block(*shape, o) for _ in range(o.layers) for shape in shapes]
    weights = torch.ones(o.rows, 1, device=o.device)
    device = "cpu" if o.smoke else torch.cuda.get_device_name(0)
    record: dict[str, Any] = {"device": device, "torch": torch.__version__, "cases": []}
    best = {}
    cases = [(kind, replace(SIZES, **change), change) for kind, changes in CHANGES.items() for change in changes]
    with torch.inference_mode():
        for kind, sizes, change in cases:
            case: dict[str, Any] = {"kernel": kind, "change": change, "sizes": asdict(sizes)}
            if time.perf_counter() - began > o.limit_seconds:
                case["error"] = "no time left"
            else:
                for count in o.counts:
                    rows = [[n % count] if count else [] for n in range(o.rows)]
                    tiles = torch.tensor(served.tile_rows(rows, 1), device=o.device).view(1, o.rows, 1 + ROWS)
                    ms = measure(kind, sizes, blocks, tiles, weights, o.device)
                    used = min(count, o.rows) * sum(b.bytes_per_adapter(kind) for b in blocks)
                    case[str(count)] = {"ms": round(ms, 4), "GB/s": round(used / ms / 1e6, 1)}
                total = sum(case[str(count)]["ms"] for count in o.counts)
                best[kind] = min(best.get(kind, (total, change)), (total, change), key=lambda one: one[0])
            record["cases"].append(case | {"at_s": round(time.perf_counter() - began, 1)})
            print(json.dumps({k: v for k, v in case.items() if k != "sizes"}), flush=True)
            record["best"] = {name: change for name, (_, change) in best.items()}
            if o.out:
                o.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"best": record["best"]}))


if __name__ == "__main__":
    main()

"""The kernels of a served decoder block, each by itself: Llama-3.1-8B's shapes, 64 rows, under CUDA graphs.

    python benchmarks/bench_serve_block.py --out serve_block.json
    python benchmarks/bench_serve_block.py --smoke                          # small, on the CPU, the twins

Microseconds of each kernel for 0, 1, 8, 16 and 64 different adapters of rank 16 on all linears, with tiles of 16 rows and
of one. Factors are those of several blocks in turn, as a step meets them: more than a cache holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_serve_kernels import milliseconds
from torch import Tensor

from veneer.kernels import served_attention, served_block
from veneer.kernels.served_block_check import table_of
from veneer.kernels.served_block_twins import Update

RANK, BLOCKS, LAUNCHES = 16, 4, 24
CASES = ((0, 16), (1, 16), (8, 16), (16, 16), (64, 16), (1, 1), (16, 1), (64, 1))


class Shape:
    """Random inputs and factors of a few blocks."""

    def __init__(self, device: str, rows: int, D: int, inner: int, heads: tuple[int, int, int], context: int) -> None:
        self.device, self.rows, self.D, self.inner, self.context = device, rows, D, inner, context
        (self.K, self.G, self.E), self.dtype = heads, torch.bfloat16 if device != "cpu" else torch.float32
        self.widths = [self.K * self.G * self.E, self.K * self.E, self.K * self.E]
        groups = {"qkv": (D, self.widths), "o": (self.widths[0], [D]), "gated": (D, [inner] * 2), "down": (inner, [D])}
        self.factors = {name: [self.group(*group) for _ in range(BLOCKS)] for name, group in groups.items()}
        self.cache = [self.random(2, rows, self.K, context, self.E) for _ in range(BLOCKS)]

    def random(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device).normal_(0, 0.1)

    def group(self, d_in: int, d_outs: list[int]) -> tuple[Tensor, list[Tensor]]:
        A = self.random(self.rows, d_in, len(d_outs) * RANK)
        return A, [self.random(self.rows, RANK, width) for width in d_outs]

    def kernels(self, adapters: int, tile: int) -> Iterator[tuple[str, Callable[[int], object]]]:
        """(name, a kernel's run for block n)."""
        table = table_of([n % adapters if adapters else -1 for n in range(self.rows)], tile, self.device)
        table = table._replace(tiles=table.tiles[table.tiles[:, 1] >= 0])  # a step has few that stay empty
        x, y, weight = self.random(self.rows, self.D), self.random(self.rows, self.D), self.random(self.D)
        position = torch.full((self.rows,), self.context // 4 - 1, device=self.device)
        where = torch.arange(self.rows, device=self.device), position
        q, turn = self.random(self.rows, self.K, self.G, self.E), [self.random(self.rows, self.E) for _ in range(2)]
        qkv = self.random(self.rows, sum(self.widths)).split(self.widths, 1)
        gate, up = self.random(self.rows, 2 * self.inner).split(self.inner, 1)
        attended = served_attention.attend_parts(q, *self.cache[0], *where, 0.1)

        def update(name: str, parts: int) -> Callable[[int], Update | None]:
            if not adapters:
                return lambda n: None
            hidden = self.random(parts, self.rows, len(self.factors[name][0][1]) * RANK).float()
            return lambda n: Update(hidden, self.factors[name][n][1])

        A = lambda name, n: self.factors[name][n][0] if adapters else None  # noqa: E731
        o, down = update("o", self.K * self.G), update("down", -(-self.inner // served_block.GATED))
        rotated, activated = update("qkv", 1), update("gated", 1)
        if adapters:
            yield "add o", lambda n: served_block.add(x, y, o(n), table, weight, A("gated", n))
            yield "add down", lambda n: served_block.add(x, y, down(n), table, weight, A("qkv", n))
        yield "norm", lambda n: served_block.norm(x, None if adapters else y, weight, 1e-5)
        yield "rotate", lambda n: served_block.rotate(qkv, rotated(n), table, None, 0.0, turn, *where, *self.cache[n])
        yield "attend", lambda n: served_attention.attend_parts(q, *self.cache[n], *where, 0.1)
        yield "gather", lambda n: served_attention.gather(attended, table, A("o", n), x)
        yield "gated", lambda n: served_block.gated(gate, up, activated(n), table, A("down", n))


def microseconds(run: Callable[[int], object], device: str) -> float:
    """Of one launch, in a captured run of several where there is a GPU."""

    def launches() -> None:
        for n in range(LAUNCHES):
            run(n % BLOCKS)

    return 1000 * milliseconds(launches, device) / LAUNCHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    device = "cpu" if o.smoke else o.device
    small = {"rows": 64, "D": 64, "inner": 96, "heads": (2, 2, 16), "context": 64}
    large = {"rows": 64, "D": 4096, "inner": 14336, "heads": (8, 4, 128), "context": 1024}
    shape, cases = Shape(device, **(small if o.smoke else large)), []
    with torch.inference_mode():
        for adapters, tile in CASES:
            found = {name: round(microseconds(run, device), 1) for name, run in shape.kernels(adapters, tile)}
            cases.append({"adapters": adapters, "rows_of_a_tile": tile, "microseconds": found})
            print(json.dumps(cases[-1]), flush=True)
    if o.out:
        name = "cpu" if device == "cpu" else torch.cuda.get_device_name(0)
        o.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()

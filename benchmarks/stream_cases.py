"""The cases of `bench_stream.py`: each (record, smoke) → None, in a process of its own."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

import stream_peers
from stream_measure import Bench
from stream_record import Record

UNSLOTH = {8: 2972, 12: 21848, 16: 40724, 24: 78475}
"""Published longest context of 8B QLoRA by GB of GPU memory."""
LENGTHS = {8: (32768, 20480, 3716), 12: (57344, 40960, 27310), 16: (81920, 65536, 50905), 24: (122880, 98304)}
"""Tried one after the other until one fits; the last is 1.25 times the published one or just above."""


def fitting(record: Record, case: str, name: str, run, sizes: tuple[int, ...]) -> tuple[int, dict | None]:
    """(row size, result) of the first of these row sizes that fits in memory; the others that were tried are results."""
    for row in sizes:
        found = record.measure(case, f"{name}, rows of {row}", lambda row=row: run(row))
        if found:
            return row, found
    return sizes[-1], None


def sequences(tokens: int, row: int) -> list[int]:
    """Lengths of a step's sequences: 2048 tokens each, or a row's."""
    return [min(row, 2048)] * (tokens // min(row, 2048))


def streamed(record: Record, case: str, bench: Bench, tokens: int, budget: float, sizes: tuple[int, ...]) -> None:
    """Steps of `tokens` tokens, streamed within a budget, and without copies; `resident` compares with them."""
    note, dial = bench.note(), "recompute-offload"

    def run(row: int) -> dict:
        return note | bench.run(sequences(tokens, row), dial, row=row, budget=budget, bound=True, compare=True)

    if fitting(record, case, "streamed", run, sizes)[1]:
        torch().save([flat.cpu() for flat in bench.gradient], gradient_file(case))


def resident(record: Record, case: str, bench: Bench, tokens: int, dials: tuple[str, ...]) -> None:
    """The same step with every weight on the device, and how the streamed one, measured before, compares."""
    before = record.values["cases"].get(case, {}).items()
    rows, beside = next(
        ((name.rsplit(" ", 1)[1], v) for name, v in before if "rows of" in name and "failed" not in v), ("2048", None)
    )
    bench.to_device()
    for dial in dials:
        compare = dial == "recompute" and gradient_file(case).exists()
        run = partial(bench.run, sequences(tokens, int(rows)), dial, row=int(rows), budget=None, compare=compare)
        found = record.measure(case, f"resident, {dial}", run)
        if found and beside:
            found["streamed_share"] = round(beside["tokens_per_second"] / found["tokens_per_second"], 3)
            if compare:
                kept = [flat.to(bench.device) for flat in torch().load(gradient_file(case))]
                found["gradient_difference"] = bench.difference(kept)
            record.write()
            print(json.dumps({key: found[key] for key in found if "streamed" in key or "gradient" in key}), flush=True)


def gradient_file(case: str) -> Path:
    """Where the gradient of a streamed step is kept for the comparison with the resident one."""
    return Path(tempfile.gettempdir()) / f"veneer-bench-stream-{case}.pt"


def torch():
    import torch

    return torch


def bfloat16_8b(record: Record, smoke: bool) -> None:
    streamed(record, "a", Bench("8B", None, smoke), 32768, 4, (4096, 2048))


def bfloat16_8b_resident(record: Record, smoke: bool) -> None:
    resident(record, "a", Bench("8B", None, smoke), 32768, ("recompute", "selective"))


def nf4_8b(record: Record, smoke: bool) -> None:
    streamed(record, "b", Bench("8B", "nf4", smoke), 16384, 2.5, (2048, 1024))


def nf4_8b_resident(record: Record, smoke: bool) -> None:
    resident(record, "b", Bench("8B", "nf4", smoke), 16384, ("recompute", "selective"))


def one_row_nf4(budget: int, dial: str, optimizer: str, compile: bool, record: Record, smoke: bool) -> None:
    """1x2048 with all blocks on the device and the embedding on the host; case u has a peer within the same memory."""
    bench = Bench("8B", "nf4", smoke, optimizer)
    bench.to_device(embedding="host")
    run = partial(bench.run, [2048], dial, budget=budget, steps=4, compile=compile)
    record.measure("e", f"{budget} GB, {dial}, embedding on the host", run)


def one_row_nf4_head(record: Record, smoke: bool) -> None:
    """1x2048 with all blocks on the device, and the embedding and the head on the host."""
    bench = Bench("8B", "nf4", smoke)
    bench.stream(resident=len(bench.blocks))
    run = partial(bench.run, [2048], "recompute-offload", budget=6, steps=4)
    record.measure("e", "6 GB, embedding and head on the host", run)


def longest_nf4(budget: int, record: Record, smoke: bool) -> None:
    bench = Bench("8B", "nf4", smoke)
    for length in LENGTHS[budget]:
        published = {"unsloth_published": UNSLOTH[budget], "share": round(length / UNSLOTH[budget], 2)}
        found = record.measure(
            "f", f"{budget} GB, {length} tokens",
            lambda n=length, p=published: p | bench.run([n], "recompute-offload", budget=budget, warm=False),
        )  # fmt: skip
        if found:
            return


def nf4_70b(record: Record, smoke: bool) -> None:
    bench = Bench("70B", "nf4", smoke)
    note = bench.note()

    def run(row: int) -> dict:
        return note | bench.run(sequences(4096, row), "recompute-offload", row=row, budget=8, steps=1, bound=True)

    fitting(record, "c", "streamed", run, (2048, 1024))


def moe_30b(record: Record, smoke: bool) -> None:
    bench = Bench("30B-A3B", None, smoke)
    rows = [2048] * 8
    record.measure(
        "d",
        "streamed",
        lambda: bench.note() | bench.run(rows, "recompute-offload", budget=8, steps=1, compile=False),
    )


def experts_30b(record: Record, smoke: bool) -> None:
    """Adapters on the experts too, of a rank that leaves room: 16 would be 10 GB of adapter and optimiser."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    bench = Bench("30B-A3B", None, smoke, rank=1, alpha=2, target_parameters=names)
    rows = [2048] * 4
    record.measure(
        "x",
        "streamed, experts adapted",
        lambda: bench.note() | bench.run(rows, "recompute-offload", budget=8, steps=1, compile=False),
    )


CASES = {
    "a": bfloat16_8b,
    "A": bfloat16_8b_resident,
    "b": nf4_8b,
    "B": nf4_8b_resident,
    "c": nf4_70b,
    "e6": partial(one_row_nf4, 6, "recompute-offload", "adamw-8bit", False),  # compiled, a block takes 0.4 GB more
    "e8": partial(one_row_nf4, 8, "recompute", "adamw", True),
    "E": one_row_nf4_head,
    "u": stream_peers.unsloth_in,
    "d": moe_30b,
    "x": experts_30b,
    "p": stream_peers.offloaded_peft,
    "q": stream_peers.offloaded_fsdp,
    **{f"f{budget}": partial(longest_nf4, budget) for budget in LENGTHS},
}

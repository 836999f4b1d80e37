"""Serving many adapters in one batch on the CPU, beside the same engine's base alone and PEFT's mixed batch.

    python benchmarks/bench_serve.py --out benchmarks/results/serve_cpu.json
    python benchmarks/bench_serve.py --adapters 4 --requests 4 --slots 4 --new 4 --repeats 1       # a quick look

SmolLM2-135M-Instruct. Each case has `adapters` adapters with random factors; `requests` requests, one for each adapter
in turn, are answered greedily, `slots` at a time, and the prefix cache is emptied between runs. PEFT runs the same
prompts in batches of `slots` with `generate(adapter_names=…)`. In `equal` all answers have `new` tokens; in `varied`
from a quarter of that to seven quarters, and PEFT's batches go on until their longest answer is done, as they must.
Runs alternate: base, mixed, PEFT, base, … so that other work on the machine meets all; figures are medians of wall
time, and besides of CPU time, which other work hardly touches. `bound` is the share of the base's speed that would be
left if a step did nothing but read its weights once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.serve import Engine, Registry, Request, Sampling

MODEL = "smollm2-135m-instruct"
CASES = {
    "rank 8 on q and v (PEFT's defaults)": {"rank": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank 8 on q, k, v and o": {"rank": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "rank 16 on all linears": {"rank": 16, "target_modules": "all-linear"},
}


def write_adapters(model: Any, folder: Path, count: int, case: dict[str, Any]) -> None:
    bank = veneer.attach(model, veneer.AdapterConfig(alpha=2 * case["rank"], **case))
    for n in range(count):
        generator = torch.Generator().manual_seed(n)
        for parameter in bank.parameters("default").values():
            parameter.data.normal_(std=0.02, generator=generator)
        veneer.save_adapter(model, folder / f"a{n}")
    veneer.detach(model)


def prompts(o: argparse.Namespace) -> list[list[int]]:
    return [torch.randint(100, 40_000, (o.prompt,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(o.requests)]  # fmt: skip # noqa: E501


def lengths(o: argparse.Namespace, varied: bool) -> list[int]:
    """Tokens of each answer; the same mean both ways, nearly."""
    return [max(1, o.new * (1 + n * 5 % 7) // 4) if varied else o.new for n in range(o.requests)]


def timed(call) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def run_engine(engine: Engine, o: argparse.Namespace, mixed: bool, new: list[int]) -> None:
    engine.slots.forget()
    tickets = [
        engine.submit(
            Request(prompt, Sampling(new[n], 0.0, ignore_eos=True), ((f"a{n % o.adapters}", 1.0),) if mixed else ())
        )
        for n, prompt in enumerate(prompts(o))
    ]
    for ticket in tickets:
        assert list(ticket)[-1].finish_reason == "length"


def run_peft(model: Any, o: argparse.Namespace, new: list[int]) -> None:
    ids = prompts(o)
    for start in range(0, o.requests, o.slots):
        batch = torch.tensor(ids[start : start + o.slots])
        names = [f"a{n % o.adapters}" for n in range(start, start + len(batch))]
        longest = max(new[start : start + o.slots])
        with torch.inference_mode():
            out = model.generate(
                input_ids=batch, attention_mask=torch.ones_like(batch), adapter_names=names, do_sample=False,
                max_new_tokens=longest, min_new_tokens=longest, pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == o.prompt + longest


def load_peft(folder: Path, o: argparse.Namespace) -> Any:
    from peft import PeftModel

    base, _ = veneer.load_base(MODEL, device="cpu", dtype=o.dtype)
    model = PeftModel.from_pretrained(base, folder / "a0", adapter_name="a0")
    for n in range(1, o.adapters):
        model.load_adapter(folder / f"a{n}", adapter_name=f"a{n}")
    return model.eval()


def run_case(model: Any, tokenizer: Any, case: dict[str, Any], o: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(model, folder, o.adapters, case)
        registry = Registry(model, allowed=[folder])
        for n in range(o.adapters):
            registry.load(f"a{n}", folder / f"a{n}")
        peft = load_peft(folder, o)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        engine = Engine(model, tokenizer, registry, slots=o.slots, context=256, queue=o.requests)
        engine.start()
        figures = {"adapter_mib": round(registry.info("a0").bytes / 2**20, 2)}
        adapters = min(o.slots, o.adapters) * registry.info("a0").bytes
        figures["bound"] = round(weights / (weights + adapters), 3)
        for kind in ("equal", "varied"):
            figures[kind] = compare(engine, peft, o, lengths(o, kind == "varied"))
        engine.shutdown(1)
        return figures


def compare(engine: Engine, peft: Any, o: argparse.Namespace, new: list[int]) -> dict[str, Any]:
    jobs = {
        "base": lambda new: run_engine(engine, o, False, new),
        "mixed": lambda new: run_engine(engine, o, True, new),
        "peft": lambda new: run_peft(peft, o, new),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for job in jobs.values():
        job([2] * len(new))  # warm
    for _ in range(o.repeats):
        for name, job in jobs.items():
            found[name].append(timed(lambda job=job: job(new)))
    wall, cpu = ({n: sum(new) / statistics.median(r[k] for r in runs) for n, runs in found.items()} for k in (0, 1))
    return {
        "tokens_per_s": {n: round(v, 1) for n, v in wall.items()},
        "tokens_per_cpu_s": {n: round(v, 1) for n, v in cpu.items()},
        "mixed_of_base": round(wall["mixed"] / wall["base"], 3),
        "mixed_of_base_cpu": round(cpu["mixed"] / cpu["base"], 3),
        "mixed_over_peft": round(wall["mixed"] / wall["peft"], 2),
        "mixed_over_peft_cpu": round(cpu["mixed"] / cpu["peft"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    model, tokenizer = veneer.load_base(MODEL, device="cpu", dtype=o.dtype)
    record: dict[str, Any] = {
        "device": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "options": vars(o) | {"out": None}, "cases": {},
    }  # fmt: skip
    for name, case in CASES.items():
        record["cases"][name] = run_case(model, tokenizer, case, o) | {"load": round(os.getloadavg()[0], 1)}
        print(name, json.dumps(record["cases"][name]), flush=True)
        if o.out:
            o.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

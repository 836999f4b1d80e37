"""What `veneer plan` predicts against what a step needs: peak memory and tokens/s over a grid of settings.

    python benchmarks/bench_plan.py --gpus 0,1 --jobs 5 --out benchmarks/results/plan_gpu.json           memory
    python benchmarks/bench_plan.py --gpus 0,1 --speed --out benchmarks/results/plan_gpu.json            speed, added
    python benchmarks/bench_plan.py --device cpu --out benchmarks/results/plan_cpu.json
    python benchmarks/bench_plan.py --device cpu --smoke --jobs 2                              three tiny settings

Random weights made on the device, random tokens, real forward, backward and update; each setting is a process of its own
(plan_measure.py). On a GPU `--jobs` of them run at once where they fit together; with --speed one has the device for
itself while the next one imports. On a CPU freed memory is given back as in a run with train.vram, and the peak is of
resident memory (VmHWM); seconds are of one thread's own work. Results are written as they come; a setting that fails or
takes longer than --setting-seconds is recorded and the others run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from plan_cases import Case, cpu_cases, gigabytes, gpu_cases, smoke_cases, speed_cases

TOGETHER = 130.0
"""GB that the settings on one device may take at once."""


@dataclass
class Child:
    """A process at work on something, with its output in files."""

    process: subprocess.Popen
    out: Any
    errors: Any
    case: Case | None
    began: float = field(default_factory=time.time)

    def done(self, limit: float) -> bool:
        """Whether it has ended; ends it when its time is over."""
        if self.process.poll() is None and time.time() - self.began > limit:
            self.process.kill()
            self.process.wait()
        return self.process.poll() is not None

    def result(self) -> dict:
        """What it printed, or how it failed."""
        for file in (self.out, self.errors):
            file.seek(0)
        found = [line for line in self.out.read().splitlines() if line.startswith("RESULT ")]
        lines = self.errors.read().strip().splitlines()
        for file in (self.out, self.errors):
            file.close()
        if found:
            return json.loads(found[-1].removeprefix("RESULT "))
        code, seconds = self.process.returncode, time.time() - self.began
        text = f"the process ended with {code} after {seconds:.0f} s: {' '.join(lines[-1:])[:400]}"
        return {"failed": text} | ({"case": asdict(self.case)} if self.case else {})


def start(work: str, device: str, gpu: str | None, case: Case | None = None, *more: str) -> Child:
    """A process of plan_measure.py, on one GPU alone."""
    command = [sys.executable, str(Path(__file__).with_name("plan_measure.py")), work, "--device", device, *more]
    if case is not None:
        command += ["--case", json.dumps(asdict(case))]
    environment = dict(os.environ)
    if gpu is not None:
        cache = Path(environment.get("TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir()) / "veneer-inductor"))
        environment |= {"CUDA_VISIBLE_DEVICES": gpu, "TORCHINDUCTOR_CACHE_DIR": str(cache / f"gpu{gpu}")}
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
        environment.setdefault("OMP_NUM_THREADS", "2")
    out, errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    return Child(subprocess.Popen(command, stdout=out, stderr=errors, text=True, env=environment), out, errors, case)


def measure_rates(device: str, gpus: list[str | None]) -> dict[str | None, dict]:
    """The rates of each device, measured alone; a failure ends the program."""
    children = {gpu: start("rates", device, gpu) for gpu in gpus}
    while not all([child.done(150) for child in children.values()]):
        time.sleep(0.05)
    found = {gpu: child.result() for gpu, child in children.items()}
    if failed := [rates["failed"] for rates in found.values() if "failed" in rates]:
        sys.exit(f"rates: {failed[0]}")
    return found


def run(cases: list[Case], work: str, options: argparse.Namespace, keep) -> None:
    """Measure all cases, as many at once as may be; `keep` takes each result."""
    gpus: list[str | None] = options.gpus.split(",") if options.device == "cuda" else [None]
    until, waiting = time.time() + options.limit_seconds, list(cases)
    rates = measure_rates(options.device, gpus)
    running: dict[str | None, list[Child]] = {gpu: [] for gpu in gpus}
    locks = {gpu: str(Path(tempfile.mkdtemp(prefix="veneer-plan-")) / "lock") for gpu in gpus}
    while waiting or any(running.values()):
        for gpu in gpus:
            for child in [
                child for child in running[gpu] if child.done(min(options.setting_seconds, until - child.began))
            ]:
                running[gpu].remove(child)
                keep({"gpu": gpu, "wall_seconds": round(time.time() - child.began, 1)} | child.result())
            case = fitting(waiting, running[gpu], options.jobs)
            if case is not None and time.time() < until:
                waiting.remove(case)
                if gpu is None and not running[gpu]:
                    rates = measure_rates(options.device, gpus)  # a CPU's change with what else it does
                more = "--rates", json.dumps(rates[gpu]), "--lock", locks[gpu]
                running[gpu].append(start(work, options.device, gpu, case, *more))
        if time.time() > until:
            for case in waiting:
                keep({"case": asdict(case), "skipped": "--limit-seconds"})
            waiting.clear()
        time.sleep(0.05)


def fitting(waiting: list[Case], running: list[Child], jobs: int) -> Case | None:
    """The next setting that fits beside those that run; one that is too large for company comes when it is alone."""
    if len(running) >= jobs:
        return None
    taken = sum(gigabytes(child.case) for child in running)
    return next((case for case in waiting if not running or taken + gigabytes(case) < TOGETHER), None)


def line_of(record: dict) -> str:
    """One line: predicted and measured, with the error."""
    name = Case(**record["case"]).name
    if "measured" not in record:
        return f"{name:70s} {record.get('failed') or record.get('skipped')}"
    measured, need, parts = record["measured"], record["need"], []
    for key, said in (("allocated", "allocated"), ("reserved", "reserved"), ("rss", "total")):
        if key in measured:
            parts.append(f"{key} {measured[key] / 1e9:.2f} GB ({need[said] / measured[key] - 1:+.1%})")
    speed = record["time"]["tokens_per_second"] / measured["tokens_per_second"] - 1
    parts.append(f"{measured['tokens_per_second']:,.0f} tok/s ({speed:+.0%})")
    return f"{name:70s} {'  '.join(parts)}" + ("" if record.get("held", True) is True else "  OUT OF MEMORY WHEN HELD")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--only", help="settings whose name holds this text")
    parser.add_argument("--without", help="no settings whose name holds this text")
    parser.add_argument("--smoke", action="store_true", help="a few tiny settings")
    parser.add_argument("--speed", action="store_true", help="on a GPU: measure speed, each setting alone")
    parser.add_argument("--gpus", default="0", help="indices of the GPUs, with commas")
    parser.add_argument("--jobs", type=int, help="settings at once on each device (1; memory on a GPU: 4; speed: 2)")
    parser.add_argument("--limit-seconds", type=float, default=600, help="of all: what has not ended then is left out")
    parser.add_argument("--setting-seconds", type=float, default=150, help="of one setting")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.jobs = options.jobs or (1 if not cuda else 2 if options.speed else 4)
    cases = speed_cases() if options.speed else gpu_cases() if cuda else cpu_cases()
    cases = [case for case in (smoke_cases() if options.smoke else cases) if (options.only or "") in case.name]
    cases = [case for case in cases if not options.without or options.without not in case.name]
    part = "speed" if options.speed else "results"
    record: dict = {"results": []}
    if options.out and options.out.exists():
        record |= json.loads(options.out.read_text(encoding="utf-8"))
    arguments = [text for text in sys.argv[1:] if not text.endswith(".json") and text != "--out"]
    record |= {"command": " ".join(["python benchmarks/bench_plan.py", *arguments]), "machine": machine(options.device)}
    record[part] = []

    def keep(result: dict) -> None:
        record[part].append(result)
        print(line_of(result), flush=True)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    run(cases, "speed" if options.speed else "memory", options, keep)


def machine(device: str) -> dict:
    """Said without starting CUDA in this process."""
    import torch
    import transformers

    name = "cpu"
    if device == "cuda":
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
        name = (asked.stdout.strip().splitlines() or ["?"])[0]
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()

"""What `veneer plan` predicts against what a step needs: peak memory and tokens/s over a grid of settings.

    python benchmarks/bench_plan.py --gpus 0,1 --out benchmarks/results/plan_gpu.json                    memory
    python benchmarks/bench_plan.py --gpus 0,1 --speed --out benchmarks/results/plan_gpu.json            speed, added
    python benchmarks/bench_plan.py --append --out benchmarks/results/plan_gpu.json                      what is missing
    python benchmarks/bench_plan.py --append before.json --out now.json            what is missing there, both in now.json
    python benchmarks/bench_plan.py --device cpu --out benchmarks/results/plan_cpu.json
    python benchmarks/bench_plan.py --device cpu --smoke --jobs 2                              a few tiny settings

Random weights made on the device, random tokens, real forward, backward and update, by workers (plan_measure.py) that
take one setting after the other. On a GPU `--jobs` of them run at once where they fit together; with --speed they are
compiled and warm at once, and then each in turn has the device for itself; what still compiles when the time that is
left is wanted for that is left out. On a CPU each setting has a process of its own, freed memory is given back as in
a run with train.vram, and the peak is of resident memory (VmHWM); seconds are of one thread's own work. Results are
written as they come; a setting that fails or takes longer than --setting-seconds is recorded and the others run;
--append keeps what was measured before, in --out or another file, and takes the other settings only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plan_cases import Case, cpu_cases, gigabytes, gpu_cases, smoke_cases, speed_cases
from plan_measure import serve

from veneer.files import write_text

TOGETHER = 138.0
"""GB that the settings on one device may take at once."""
ALONE_SECONDS = 4.0
"""What a setting that is compiled and warm takes alone on its device, at most by and large."""
AGAIN = "not tried with this prediction"
"""`held` of a setting whose prediction has changed since it was measured: `scripts/memory_table.py --again`."""
PATIENCE = 6
"""How many smaller settings may pass by one that does not fit yet."""


class Worker:
    """A process that measures settings, and what it is at."""

    def __init__(self, device: str, gpu: str | None, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, device, gpu, threads), daemon=True)
        self.process.start()
        end.close()
        self.gpu, self.case, self.state, self.began = gpu, None, "starting", time.time()

    def ask(self, work: str, case: Case | None = None, rates: dict | None = None) -> None:
        """Set it to work on something."""
        self.case, self.state, self.began = case, "busy", time.time()
        self.pipe.send((work, case, rates))

    def go(self) -> None:
        """Let it go on alone."""
        self.state = "alone"
        self.pipe.send(None)

    def answer(self, limit: float) -> dict | None:
        """What it has found, or how it failed or outlived its time; None as yet."""
        found = self._received()
        if found is None and time.time() - self.began > limit:
            found = self._ended(f"it took more than {limit:.0f} s")
        return found

    def _received(self) -> dict | None:
        try:
            while self.pipe.poll():
                found = self.pipe.recv()
                if isinstance(found, tuple):
                    found, stays = found
                    self.state = "idle" if stays else "over"
                    return found
                self.state = {"there": "idle"}.get(found, found)
        except (EOFError, OSError):
            self.process.join(5)
            return self._ended(f"the process ended with {self.process.exitcode}")
        return None

    def _ended(self, why: str) -> dict:
        self.end()
        return {"failed": f"{why} after {time.time() - self.began:.0f} s"} | (
            {"case": asdict(self.case)} if self.case else {}
        )

    def end(self) -> None:
        """Stop the process."""
        self.state = "over"
        self.process.kill()
        self.process.join()

    @property
    def takes(self) -> float:
        """GB of device memory."""
        return gigabytes(self.case, self.state == "ready") if self.state in ("busy", "ready", "alone") else 0.0


class Device:
    """The workers on one GPU, or on the CPU, and the settings that they take from `waiting`."""

    def __init__(self, gpu: str | None, waiting: list[Case], options: argparse.Namespace) -> None:
        self.gpu, self.waiting, self.options = gpu, waiting, options
        self.work = "cpu" if gpu is None else "speed" if options.speed else "memory"
        self.threads = threads_each(options.jobs * len(options.gpus.split(",")))
        self.workers = [self.hire() for _ in range(min(options.jobs, len(waiting)))]
        self.passed: dict[Case, int] = {}
        self.alone = False
        self.closing = False
        """Whether no setting begins any more."""
        self.rates: dict = {}

    def hire(self) -> Worker:
        return Worker(self.options.device, self.gpu, self.threads)

    @property
    def running(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state in ("busy", "ready", "alone")]

    def measure_rates(self) -> None:
        """The rates of the device while nothing else runs; a failure ends the program."""
        while any(worker.state == "starting" and worker.answer(150) is None for worker in self.workers):
            time.sleep(0.02)
        worker = self.workers[0]
        if worker.state == "idle":
            worker.ask("rates")
            while (found := worker.answer(150)) is None:
                time.sleep(0.02)
            if "failed" not in found:
                self.rates = found
                return
        sys.exit(f"the rates of device {self.gpu or 'cpu'} could not be measured")

    def turn(self, keep: Callable[[dict], None], until: float) -> None:
        """Take what was found, and set workers to work."""
        for i, worker in enumerate(self.workers):
            if worker.state == "starting" or worker in self.running:
                found = worker.answer(self.options.setting_seconds)
                if found is not None and worker.case is not None:
                    keep({"gpu": self.gpu, "wall_seconds": round(time.time() - worker.began, 1)} | found)
                elif found is not None:
                    print(f"a worker could not start: {found['failed']}", file=sys.stderr)
            if worker.state == "over" and self.waiting and not self.closing:
                self.workers[i] = self.hire()
        if self.work == "speed":
            self.close_in_time(keep, until)
        if time.time() < until:
            self.start_more()

    def close_in_time(self, keep: Callable[[dict], None], until: float) -> None:
        """End what still compiles once the time that is left is wanted for the settings that are ready."""
        left = [worker for worker in self.running if worker.state in ("ready", "alone")]
        if not left or time.time() < until - ALONE_SECONDS * (len(left) + 1):
            return
        self.closing = True
        for worker in self.running:
            if worker.state == "busy":
                keep({"case": asdict(worker.case), "skipped": "--limit-seconds, while it was compiled"})
                worker.end()

    def start_more(self) -> None:
        """Let idle workers begin; or, when all that fits is compiled, one of those that are ready measure alone."""
        self.alone = self.alone and bool(self.running)
        for worker in self.workers:
            if worker.state != "idle" or self.alone or self.closing:
                continue
            if self.gpu is None and not self.running and not self.rates:
                self.measure_rates()  # a CPU's change with what else it does; its worker ends with it
                return
            if (case := self.fitting()) is None:
                break
            self.waiting.remove(case)
            worker.ask(self.work, case, self.rates)
            self.rates = self.rates if self.gpu is not None or len(self.running) > 1 else {}
        if self.running and all(worker.state == "ready" for worker in self.running):
            more = any(worker.state in ("starting", "idle") for worker in self.workers) and self.fitting() is not None
            self.alone = self.alone or self.closing or not more
        ready = [worker for worker in self.running if worker.state == "ready"]
        if self.alone and ready and not any(worker.state in ("busy", "alone") for worker in self.running):
            ready[0].go()

    def fitting(self) -> Case | None:
        """The next setting that fits beside those that run; one that is too large for company comes when it is alone."""
        taken, before = sum(worker.takes for worker in self.running), []
        for case in self.waiting:
            if not self.running or taken + gigabytes(case) < TOGETHER:
                self.passed |= {other: self.passed.get(other, 0) + 1 for other in before}
                return case
            before.append(case)
            if self.passed.get(case, 0) >= PATIENCE:
                return None
        return None


def threads_each(processes: int) -> int:
    """Threads that compile in each of so many processes; for fewer than four, starting them takes longer than they save."""
    each = (os.cpu_count() or 1) // max(1, processes)
    return each if each >= 4 else 1


def run(cases: list[Case], options: argparse.Namespace, keep: Callable[[dict], None]) -> None:
    """Measure all cases, as many at once as may be; `keep` takes each result."""
    gpus: list[str | None] = options.gpus.split(",") if options.device == "cuda" else [None]
    until, waiting = time.time() + options.limit_seconds, list(cases)
    devices = [Device(gpu, waiting, options) for gpu in gpus] if cases else []
    for device in devices:
        device.measure_rates()
    while (waiting or any(device.running for device in devices)) and time.time() < until:
        for device in devices:
            device.turn(keep, until)
        time.sleep(0.02)
    workers = [worker for device in devices for worker in device.workers]
    for case in [worker.case for worker in workers if worker.takes] + waiting:
        keep({"case": asdict(case), "skipped": "--limit-seconds"})
    for worker in workers:
        worker.end()


def line_of(record: dict) -> str:
    """One line: predicted and measured, with the error."""
    name = case_of(record).name
    if "measured" not in record:
        return f"{name:70s} {record.get('failed') or record.get('skipped')}"
    measured, need, parts = record["measured"], record["need"], []
    for key, said in (("allocated", "allocated"), ("reserved", "reserved"), ("rss", "total")):
        if key in measured:
            parts.append(f"{key} {measured[key] / 1e9:.2f} GB ({need[said] / measured[key] - 1:+.1%})")
    speed = record["time"]["tokens_per_second"] / measured["tokens_per_second"] - 1
    parts.append(f"{measured['tokens_per_second']:,.0f} tok/s ({speed:+.0%})")
    parts.append(f"{record.get('wall_seconds', 0):.0f} s")
    parts += ["OUT OF MEMORY WHEN HELD"] * (record.get("held", True) is not True) + record.get("notes", [])
    return f"{name:70s} {'  '.join(parts)}"


def case_of(record: dict) -> Case:
    return Case(**record["case"] | {"lengths": tuple(record["case"]["lengths"])})


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument(
        "--append",
        nargs="?",
        type=Path,
        const=Path(),
        help="keep what --out or this file holds; measure what it has not",
    )
    parser.add_argument("--only", help="settings whose name holds this text")
    parser.add_argument("--without", help="no settings whose name holds this text")
    parser.add_argument("--smoke", action="store_true", help="a few tiny settings")
    parser.add_argument("--speed", action="store_true", help="on a GPU: measure speed, each setting alone")
    parser.add_argument("--gpus", default="0", help="indices of the GPUs, with commas")
    parser.add_argument("--jobs", type=int, help="settings at once on each device (CPU: 1; GPU: 12)")
    parser.add_argument("--limit-seconds", type=float, default=600, help="of all: what has not ended then is left out")
    parser.add_argument("--setting-seconds", type=float, default=150, help="of one setting (with --speed: 300)")
    options = parser.parse_args()
    options.jobs = options.jobs or (1 if options.device == "cpu" else 12)
    options.append = options.out if options.append == Path() else options.append
    options.setting_seconds *= 2 if options.speed else 1
    return options


def main() -> None:
    options = options_of()
    cases = speed_cases() if options.speed else gpu_cases() if options.device == "cuda" else cpu_cases()
    cases = [case for case in (smoke_cases() if options.smoke else cases) if (options.only or "") in case.name]
    cases = [case for case in cases if not options.without or options.without not in case.name]
    part = "speed" if options.speed else "results"
    record: dict[str, Any] = {"results": []}
    if (before := options.append or options.out) and before.exists():
        record |= json.loads(before.read_text(encoding="utf-8"))
    arguments = [text for text in sys.argv[1:] if not text.endswith(".json") and text != "--out"]
    said = " ".join(["python benchmarks/bench_plan.py", *arguments])
    record |= {"speed_command" if options.speed else "command": said, "machine": machine(options.device)}
    record[part] = [r for r in record.get(part, []) if sound(r)] if options.append else []
    done = {case_of(result) for result in record[part]}

    def keep(result: dict) -> None:
        record[part].append(result)
        print(line_of(result), flush=True)
        if options.out:
            write_text(options.out, json.dumps(record, indent=1) + "\n")

    began = time.time()
    run([case for case in cases if case not in done], options, keep)
    print(f"{time.time() - began:.0f} s", flush=True)


def sound(result: dict) -> bool:
    """Whether a result is of a measurement as it is made now: with notes, held to its prediction as that is now, and a
    streamed base without its making."""
    if "measured" not in result or "notes" not in result or result.get("held") == AGAIN:
        return False
    return result["case"]["stream"] == "off" or "base" not in result["measured"]


def machine(device: str) -> dict:
    """Said without starting CUDA, or importing torch, in this process."""
    from importlib.metadata import version

    name = "cpu"
    if device == "cuda":
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
        name = (asked.stdout.strip().splitlines() or ["?"])[0]
    return {"device": name, "torch": version("torch"), "transformers": version("transformers")}


if __name__ == "__main__":
    main()

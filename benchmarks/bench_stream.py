"""Training over a streamed base, on one GPU whose memory is capped to play a smaller card, and on a CPU from disk.

    python benchmarks/bench_stream.py --out results.json             all GPU cases but the peers
    python benchmarks/bench_stream.py --cases a,c                    some of them
    python benchmarks/bench_stream.py --smoke                        the same code on a CPU with a tiny shape
    python benchmarks/bench_stream.py --cpu-8b DIR --out FILE        `veneer train --stream disk` on an 8B shape in DIR

Cases: a 8B bfloat16, A the same on the device · b 8B NF4, B the same on the device · c 70B NF4 beside its own compute ·
d Qwen3-30B-A3B · x the same with adapted experts · e6, e8 8B NF4, 1x2048, all blocks on the device, in 6 and 8 GB, E the
head on the host too, u Unsloth in the same memory · f8, f12, f16, f24 longest sequence of 8B QLoRA in so many GB · p and q
peers that offload to the host. Each takes about a minute on an H200, runs in a process of its own, in the order given, and
adds its results to the file as they come (--add: to what it held before). A and B compare with what a and b left there.

Random weights of the real shapes (one block's, in every block, each in memory of its own), random tokens, rank 16 on all
linears, learning rate 0 so that every run sees the same weights. A budget of n GB caps the allocator at n·10⁹ bytes. "no
copies" is the same step with the blocks' copies left out: what computing alone takes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from stream_cases import CASES
from stream_disk import cpu_8b
from stream_record import Record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", default=",".join(c for c in CASES if c not in "upq"), help="letters with commas, in any order"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--limit-seconds", type=float, default=600, help="start no measurement after so long")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--cpu-8b", type=Path, metavar="DIR", help="the CPU case alone; 16 GB are written to DIR")
    parser.add_argument("--add", action="store_true", help="keep the other cases that --out holds")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # the one case, in this process
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    if not (options.alone or options.add) and options.out:
        options.out.unlink(missing_ok=True)
    if not options.alone and not options.cpu_8b:
        sys.exit(in_processes(options, cases))
    import torch

    if options.smoke:
        torch.set_num_threads(1)
    record = Record(options.out, options.limit_seconds)
    device = "cpu" if options.smoke or options.cpu_8b else torch.cuda.get_device_name(0)
    record.values |= {"device": device, "torch": torch.__version__, "transformers": version("transformers")}
    if options.cpu_8b:
        record.limit = float("inf")
        cpu_8b(record, options.cpu_8b)
        return
    for case in cases:
        try:
            CASES[case](record, options.smoke)
        except Exception as error:  # noqa: BLE001 - a result like any other
            record.values["cases"].setdefault(case, {})["failed"] = repr(error)[:500]
            traceback.print_exc()
            record.write()


def in_processes(options: argparse.Namespace, cases: list[str]) -> int:
    """Each case in a process of its own, one after the other, so that no memory of one is another's; 1 if one died."""
    end, died = time.time() + options.limit_seconds, 0
    for case in cases:
        if time.time() > end:
            print(f"{case} left out: --limit-seconds", flush=True)
            continue
        command = [sys.executable, __file__, "--alone", "--cases", case, "--limit-seconds", str(end - time.time())]
        command += ["--smoke"] * options.smoke + (["--out", str(options.out)] if options.out else [])
        died |= bool(subprocess.run(command).returncode)
    return died


if __name__ == "__main__":
    main()

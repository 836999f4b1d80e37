"""Fit the constants of `veneer.plan.constants` to measured memory and speed, and say how well they do elsewhere.

    python benchmarks/plan_fit.py benchmarks/results/plan_gpu.json            fit on every second setting, errors on the others
    python benchmarks/plan_fit.py benchmarks/results/plan_gpu.json --all      then fit on all of them; --write puts them down

Each constant in turn is moved by ever smaller steps as long as the mean of squared relative errors falls. Errors that
are too low count four times.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from plan_cases import Case
from plan_measure import planned

from veneer.plan import constants
from veneer.plan.bytes import need
from veneer.plan.roofline import Rates, step

MEMORY = {
    "WORK_INPUTS": 0.5, "NORMS": 0.2, "KEPT_MIXED": 0.05, "EAGER_WORK": 0.02,
    "HEAD_INPUTS": 0.5,  # LONG_WORK is of longer rows than the grid has
    **{f"WORK_WIDE.{dial}": 0.5 for dial in constants.WORK_WIDE},
    **{f"UNPACKS.{dial}": 0.25 for dial in constants.UNPACKS},
}  # fmt: skip
"""What is fitted to allocated memory, with the first step."""
RESERVE = {"RESERVED": 0.01, "RESERVED_WORK": 0.02, "RESERVED_FIXED": 4 << 20, "POOL": 0.02, "POOL_WORK": 0.05}
SPEED = {"FUSED": 0.05, "PRODUCT_SHARE": 0.05, "MOVE_SHARE": 0.05, "ATTENTION_SHARE": 0.1, "UNPACK_SHARE": 0.05,
         "EAGER_CALLS": 0.2, "AGAIN_MIXED": 0.05, "COMPILED_CALLS": 0.05, "STEP_SECONDS": 0.001}  # fmt: skip


def get(name: str) -> float:
    table, _, key = name.partition(".")
    return getattr(constants, table)[key] if key else getattr(constants, table)


def put(name: str, value: float) -> None:
    table, _, key = name.partition(".")
    if key:
        getattr(constants, table)[key] = value
    else:
        setattr(constants, table, value)


def errors(results: Sequence[dict], kind: str) -> list[float]:
    """Predicted over measured, less one: of allocated or reserved memory, or of tokens/s (`speed`)."""
    found = []
    for result in results:
        about, setting = planned(Case(**result["case"] | {"lengths": tuple(result["case"]["lengths"])}), True)
        if kind == "speed":
            said = step(about, setting, Rates(**result["rates"])).tokens_per_second
            found.append(said / result["measured"]["tokens_per_second"] - 1)
        else:
            found.append(getattr(need(about, setting), kind) / result["measured"][kind] - 1)
    return found


def fit(names: dict[str, float], loss: Callable[[], float], rounds: int = 6) -> None:
    """Move each constant by its step, up and down, while the loss falls; then halve the steps."""
    best, steps = loss(), dict(names)
    for _ in range(rounds):
        for name, size in steps.items():
            for way in (size, -size):
                while (value := get(name) + way) >= 0:
                    before = get(name)
                    put(name, value)
                    if (now := loss()) < best * (1 - 1e-6):
                        best = now
                        continue
                    put(name, before)
                    break
        steps = {name: size / 2 for name, size in steps.items()}


def cost(found: Sequence[float]) -> float:
    return fmean(e * e * (4 if e < 0 else 1) for e in found)


def said(name: str, found: Sequence[float]) -> str:
    if not found:
        return f"{name}: none"
    return f"{name}: {len(found)} settings, mean |error| {fmean(map(abs, found)):.2%}, {min(found):+.2%} to {max(found):+.2%}"


def report(title: str, memory: Sequence[dict], speed: Sequence[dict]) -> None:
    print(title)
    for kind, results in (("allocated", memory), ("reserved", memory), ("speed", speed)):
        print("  " + said(kind, errors(results, kind)))


def fit_all(memory: Sequence[dict], speed: Sequence[dict]) -> None:
    if memory:
        fit(MEMORY, lambda: cost(errors(memory, "allocated")))
        fit(RESERVE, lambda: cost(errors(memory, "reserved")))
    if speed:
        fit(SPEED, lambda: fmean(e * e for e in errors(speed, "speed")))


def write() -> None:
    """Put the values into constants.py."""
    file = Path(constants.__file__)
    text = file.read_text(encoding="utf-8")
    for name in {name.partition(".")[0] for name in (*MEMORY, *RESERVE, *SPEED)}:
        value = getattr(constants, name)
        if isinstance(value, dict):
            shown = "{" + ", ".join(f'"{k}": {round(v, 3)}' for k, v in value.items()) + "}"
        else:
            shown = f"{round(value / constants.MIB)} * MIB" if value > 1e5 else f"{round(value, 3)}"
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {shown}", text, flags=re.M)
        if count != 1:
            raise SystemExit(f"{name} is not on a line of its own in {file.name}")
    file.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--all", action="store_true", help="fit on all settings in the end")
    parser.add_argument("--write", action="store_true", help="put what was fitted last into constants.py")
    parser.add_argument("--list", action="store_true", help="the error of each setting, worst first")
    options = parser.parse_args()
    record = json.loads(options.file.read_text(encoding="utf-8"))
    memory = [r for r in record["results"] if "measured" in r]
    speed = [r for r in record.get("speed", []) if "measured" in r]
    report("as they are, all settings", memory, speed)
    fit_all(memory[::2], speed[::2])
    report("fitted on every second setting, those", memory[::2], speed[::2])
    report("the others", memory[1::2], speed[1::2])
    if options.all:
        fit_all(memory, speed)
        report("fitted on all", memory, speed)
    for name in (*MEMORY, *RESERVE, *SPEED):
        print(f"  {name} = {get(name):.4g}")
    if options.list:
        for kind, results in (("allocated", memory), ("reserved", memory), ("speed", speed)):
            pairs = zip(errors(results, kind), results)
            for error, result in sorted(pairs, key=lambda pair: -abs(pair[0])):
                case = Case(**result["case"] | {"lengths": tuple(result["case"]["lengths"])})
                print(f"  {kind:9s} {error:+.1%}  {case.name}")
    if options.write:
        write()


if __name__ == "__main__":
    main()

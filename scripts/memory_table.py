"""Write the measured part of docs/memory.md, and its plots, from the results of benchmarks/bench_plan.py.

python scripts/memory_table.py            the table between the marks in docs/memory.md, docs/memory_*.png
python scripts/memory_table.py --again    with predictions made anew by this version's arithmetic, in the results too

With --again a change of `veneer.plan.constants` shows without a new measurement. A setting then counts as held to its
prediction if it took no more than that and the margin by itself, or ran with as much; else it is to be measured again,
which benchmarks/bench_plan.py --append does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]
from bench_plan import AGAIN  # noqa: E402

from veneer.plan import constants  # noqa: E402

PAGE, MARKS = ROOT / "docs/memory.md", ("<!-- measured -->", "<!-- end of measured -->")
FILES = {"CPU": "plan_cpu.json", "GPU": "plan_gpu.json"}
WHAT = {"allocated": "allocated", "reserved": "reserved", "rss": "total"}
"""What is measured → what is predicted of it."""


def load(file: Path, again: bool) -> dict | None:
    """A results file; with `again` its predictions made anew, in the file too."""
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    for part in ("results", "speed"):
        record[part] = [r for r in record.get(part, []) if "skipped" not in r]
    if again:
        predict(record["results"] + record["speed"])
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def predict(results: list[dict]) -> None:
    """Put new predictions in; time, which needs the machine's rates, with another record's where one holds none."""
    from plan_cases import Case
    from plan_measure import predicted

    from veneer.plan.roofline import Rates

    rates = next((result["rates"] for result in results if "rates" in result), None)
    for result in results:
        if "measured" in result:
            case = Case(**result["case"] | {"lengths": tuple(result["case"]["lengths"])})
            cuda, known = "allocated" in result["measured"], result.get("rates", rates)
            new = predicted(case, Rates(**known) if known else None, cuda, result.get("context"))
            result |= {"held": still_held(result, new["need"]["reserved"])} if "held" in result else {}
            result |= new


def still_held(result: dict, reserved: float) -> bool | str:
    """What `held` is for another prediction of the reserved memory: as it was where that follows, or `AGAIN`."""
    before = result["need"]["reserved"]
    if result["measured"]["reserved"] <= reserved * (1 + constants.MARGIN):
        return True
    known = before <= reserved if result["held"] is True else reserved <= before
    return result["held"] if known else AGAIN


def errors(results: list[dict], key: str) -> list[float]:
    """Predicted over measured, less one."""
    return [r["need"][WHAT[key]] / r["measured"][key] - 1 for r in results if key in r.get("measured", {})]


def added(results: list[dict]) -> list[float]:
    """The same of what a CPU's step adds to what its process held before."""
    own = [(r, r["need"]["context"]) for r in results if "rss" in r.get("measured", {})]
    return [(r["need"]["total"] - context) / (r["measured"]["rss"] - context) - 1 for r, context in own]


def speeds(results: list[dict]) -> list[float]:
    return [r["time"]["tokens_per_second"] / r["measured"]["tokens_per_second"] - 1 for r in results if "measured" in r]


def summary(name: str, found: list[float]) -> str:
    if not found:
        return ""
    mean = fmean(abs(e) for e in found)
    return (
        f"| {name} | {len(found)} | {mean:.1%} | {fmean(found):+.1%} | {min(found):+.1%} | {max(found):+.1%} | "
        f"{sum(abs(e) <= 0.08 for e in found)} |"
    )


def table(results: list[dict], timed: list[dict]) -> str:
    """Errors by what is predicted, and of memory by setting of the dial; tokens/s of the settings in `timed`."""
    head = (
        "| | settings | mean \\|error\\| | mean | most under | most over | within 8 % |\n|---|---|---|---|---|---|---|"
    )
    memory = next(key for key in ("allocated", "rss") if errors(results, key))
    rows = [summary(f"peak memory, {key}", errors(results, key)) for key in WHAT]
    rows.append(summary("… over what the process held before", added(results)))
    for part in ("dial", "quant", "stream", "compile"):
        values = dict.fromkeys(r["case"][part] for r in results if "measured" in r)
        if len(values) > 1:
            label = "checkpointing" if part == "dial" else part
            rows += [
                summary(f"… {label} {value}", errors([r for r in results if r["case"][part] == value], memory))
                for value in values
            ]
    rows.append(summary("tokens/s", speeds(timed)))
    for value in (True, False):
        own = [r for r in timed if r["case"]["compile"] is value]
        rows.append(summary(f"… compile {value}", speeds(own)) if 0 < len(own) < len(timed) else "")
    return "\n".join([head, *[row for row in rows if row]])


def section(name: str, record: dict) -> str:
    results, machine = record["results"], record["machine"]
    failed = [r for r in results if "measured" not in r]
    held = [r["held"] for r in results if "held" in r]
    lines = [
        f"### {name}: {machine['device']}",
        f"`{record['command']} --out benchmarks/results/{FILES[name]}`; torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {len(results) - len(failed)} settings.",
        table(results, record["speed"] or ([] if name == "GPU" else results)),  # several at once share a GPU
    ]
    if held:
        held, ran = [h for h in held if h != AGAIN], sum(h is True for h in held)
        lines.append(
            f"With the allocator held to the prediction and the plan's margin of {constants.MARGIN:.0%}, {ran} of "
            f"{len(held)} settings ran."
        )
    if failed:
        lines.append(f"{len(failed)} did not run: " + "; ".join(str(r.get("failed"))[:120] for r in failed[:5]) + ".")
    lines.append(f"![predicted against measured](memory_{name.lower()}.png)")
    return "\n\n".join(lines)


def plot(name: str, record: dict) -> None:
    """Predicted against measured memory and speed, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = [r for r in record["results"] if "measured" in r]
    key = "rss" if "rss" in results[0]["measured"] else "allocated"
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4))
    pairs = [(r["measured"][key] / 1e9, r["need"][WHAT[key]] / 1e9, r["case"]["dial"]) for r in results]
    timed = [r for r in record["speed"] if "measured" in r] or results
    speed = [(r["measured"]["tokens_per_second"], r["time"]["tokens_per_second"], r["case"]["dial"]) for r in timed]
    for axis, points, label in zip(axes, (pairs, speed), (f"peak memory, {key} (GB)", "tokens/s")):
        for dial in dict.fromkeys(p[2] for p in points):
            own = [p for p in points if p[2] == dial]
            axis.scatter([p[0] for p in own], [p[1] for p in own], s=14, label=dial)
        low, high = min(min(p[:2]) for p in points) * 0.9, max(max(p[:2]) for p in points) * 1.1
        axis.plot([low, high], [low, high], color="grey", linewidth=0.8)
        scale = "log" if high > 10 * low else "linear"
        axis.set(xscale=scale, yscale=scale, xlabel=f"measured: {label}", ylabel="predicted")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / f"docs/memory_{name.lower()}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="make the predictions anew")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--print", action="store_true", help="print the tables and write nothing")
    options = parser.parse_args()
    parts = []
    for name, file in FILES.items():
        if (record := load(options.results / file, options.again)) is None:
            continue
        parts.append(section(name, record))
        if not options.print:
            plot(name, record)
    text = "\n\n".join(parts)
    if options.print:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()

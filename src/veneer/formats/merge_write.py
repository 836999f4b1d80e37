"""Write a planned merge: each file in pieces of a few rows, whole before it has its name, checked by rows afterwards."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.base.checkpoint import DTYPES, INDEX, TensorFile, header_of, write_tensors
from veneer.files import write_text
from veneer.formats.changes import (
    Change,
    Round,
    as_matrices,
    changed_rows,
    column_norm,
    reference_row,
    spans,
    sum_dtype,
)
from veneer.formats.merge_plan import MergePlan

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
NOT_COPIED = ("*.index.json", "adapter_config.json", "veneer*.json", "complete.json")
PLAN = ".veneer-merge.json"
SAMPLES = 24
"""Tensors of a file that are checked by a row."""


@dataclass
class RoundingError:
    """Mean |written − float32| over all merged elements, beside that of rounding to nearest."""

    count: int = 0
    nearest: float = 0.0
    stochastic: float = 0.0

    @classmethod
    def of(cls, exact: Tensor, written: Tensor) -> RoundingError:
        """The sums over one block."""
        sums = [(v.float() - exact).abs().sum(dtype=torch.float64) for v in (exact.to(written.dtype), written)]
        return cls(exact.numel(), *map(float, sums))

    def add(self, other: RoundingError) -> None:
        """Add another's sums to these."""
        self.count += other.count
        self.nearest += other.nearest
        self.stochastic += other.stochastic

    def means(self) -> tuple[float, float]:
        """(to nearest, stochastic)."""
        return self.nearest / max(1, self.count), self.stochastic / max(1, self.count)


def write_merge(plan: MergePlan, partial: Path, say: Callable[[str], None]) -> tuple[RoundingError, int]:
    """Write all files of a merge into `partial`, but for those that an earlier call finished: (error, files reused)."""
    done = _resumed(plan, partial)
    reused = 0
    for number, name in enumerate(plan.entries, 1):
        if name in done and not check_file(plan, name, partial / name)[1]:
            reused += 1
            continue
        say(f"file {number} of {len(plan.entries)}: {name}")
        error = RoundingError()
        metadata = plan.checkpoint.files[name].metadata
        write_tensors(partial / name, plan.entries[name], metadata, pieces_of(plan, error))
        done[name] = [error.count, error.nearest, error.stochastic]
        write_text(partial / PLAN, json.dumps({"identity": plan.identity, "done": done}))
    _write_index(plan, partial)
    _copy_rest(plan, partial)
    totals = [sum(column) for column in zip(*done.values())]
    return RoundingError(*totals), reused


def _resumed(plan: MergePlan, partial: Path) -> dict[str, list]:
    """What an earlier merge of the same finished in `partial`, which is emptied if it was another one."""
    try:
        record = json.loads((partial / PLAN).read_text(encoding="utf-8"))
        if record["identity"] == json.loads(json.dumps(plan.identity)):
            return {name: values for name, values in record["done"].items() if (partial / name).exists()}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return {}


def pieces_of(plan: MergePlan, error: RoundingError) -> Callable[[str], Iterable[Any]]:
    """The bytes of each tensor to write, a few rows at a time."""
    codes = {key: code for entries in plan.entries.values() for key, (code, _) in entries.items()}

    def pieces(key: str) -> Iterable[Any]:
        source = plan.source.get(key, key)
        file = plan.checkpoint.files[plan.checkpoint.where[source]]
        change = plan.changes.get(key)
        if change is None and codes[key] == file.entries[source].dtype:
            return [lambda out: file.copy_to(out, source)]
        measured = error if plan.seed is not None and change is not None else None
        return _sums(file, source, change or Change(), DTYPES[codes[key]], _rounding(plan, key), measured)

    return pieces


def _rounding(plan: MergePlan, key: str) -> Round:
    if plan.seed is not None and key in plan.changes:
        return stochastic_rounding(plan.seed, key)
    return lambda total, number, out: out.copy_(total)


def _sums(
    file: TensorFile, source: str, change: Change, dtype: torch.dtype, rounded: Round, error: RoundingError | None
) -> Iterator[memoryview]:
    """The blocks of a changed tensor in order; a few threads work on the next ones while one is being written.

    Memory is used again and again: pages that the system clears anew for each block cost more than the sums.
    """
    stored = file.tensor(source)
    matrices = as_matrices(stored if change.whole is None else change.whole)
    blocks, norms = spans(matrices), {}
    row = stored.element_size() * matrices.shape[2]
    begin = file.entries[source].start
    largest = max((stop - start) * matrices.shape[2] for _, start, stop in blocks) if blocks else 0
    mine, free = threading.local(), deque()

    def work(number: int) -> tuple[Tensor, Tensor, RoundingError | None]:
        if not hasattr(mine, "memory"):
            mine.memory = torch.empty(largest, dtype=sum_dtype(matrices))
        e, start, stop = blocks[number]
        total = changed_rows(matrices, change, blocks[number], norms.get(e), mine.memory)
        try:
            memory = free.pop()
        except IndexError:
            memory = torch.empty(largest, dtype=dtype)
        block = rounded(total, number, memory[: total.numel()].view(total.shape))
        at = begin + (e * matrices.shape[1] + start) * row
        file.release(at, at + (stop - start) * row)
        return memory, block, RoundingError.of(total, block) if error is not None else None

    for e in range(len(matrices)):
        norms[e] = column_norm(matrices, change, e)
    for memory, block, own in in_order(work, len(blocks)):
        if own is not None:
            error.add(own)
        yield memoryview(block.view(torch.uint8).numpy()).cast("B")
        free.append(memory)


def in_order(work: Callable[[int], Any], count: int) -> Iterator[Any]:
    """work(0), work(1), … in order, a few ahead in threads of one core each: torch's own threads are too fine for blocks."""
    before = torch.get_num_threads()
    ahead: deque = deque()
    with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for number in range(count):
            ahead.append(pool.submit(work, number))
            if len(ahead) > 2 * before:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    torch.set_num_threads(before)


def stochastic_rounding(seed: int, key: str) -> Round:
    """float32 → bfloat16, up or down with the odds that make the result right on average (arXiv:1502.02551, eq. 2).

    A bfloat16 is the upper half of a float32: adding 16 random bits below and cutting them off rounds a magnitude up with
    the probability of its distance to the lower neighbour. Each block of each tensor has its own random numbers.
    """

    def rounded(total: Tensor, number: int, out: Tensor) -> Tensor:
        name = f"{seed}/{key}/{number}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 1)
        noise = torch.randint(0, 1 << 16, total.shape, dtype=torch.int32, generator=generator)
        bits = total.contiguous().view(torch.int32).add(noise).bitwise_and_(-1 << 16)
        return out.copy_(bits.view(torch.float32))

    return rounded


def check_file(plan: MergePlan, name: str, path: Path) -> tuple[int, str | None]:
    """(rows checked, what is wrong or None) of a written file: its head, and a row of some tensors against the formula."""
    wanted = plan.entries[name]
    chance = random.Random(f"{name}/{plan.seed}")
    changed = [key for key in wanted if key in plan.changes]
    others = [key for key in wanted if key not in plan.changes]
    chosen = chance.sample(changed, min(SAMPLES, len(changed))) + chance.sample(others, min(SAMPLES // 4, len(others)))
    try:
        head = header_of(wanted, plan.checkpoint.files[name].metadata)
        size = len(head) + sum(torch.Size(s).numel() * DTYPES[c].itemsize for c, s in wanted.values())
        with path.open("rb") as file:
            if file.read(len(head)) != head or path.stat().st_size != size:
                return 0, f"{path.name} has another head or size"
        with safe_open(path, "pt") as data:
            for key in chosen:
                if not _row_agrees(plan, key, data.get_slice(key), wanted[key], chance):
                    return len(chosen), f"{path.name}: {key} is not W + ΔW"
    except (OSError, SafetensorError) as error:
        return 0, f"{path.name}: {error}"
    return len(chosen), None


def _row_agrees(plan: MergePlan, key: str, written: Any, entry: tuple[str, tuple[int, ...]], chance: Any) -> bool:
    weight = plan.checkpoint.tensor(plan.source.get(key, key))
    if not weight.numel():
        return True
    change, dtype = plan.changes.get(key), DTYPES[entry[0]]
    matrices = as_matrices(weight)
    e, row = chance.randrange(matrices.shape[0]), chance.randrange(matrices.shape[1])
    mine = (written[e, row] if weight.ndim == 3 else written[row] if weight.ndim > 1 else written[:]).flatten()
    if change is None and dtype == weight.dtype:
        return torch.equal(mine, matrices[e, row])
    exact = reference_row(weight, change or Change(), e, row)
    ulps = 1.0 if plan.seed is not None else 0.5
    info = torch.finfo(dtype)
    slack = 1e-5 * exact.abs().max() + info.tiny
    return bool(((mine.double() - exact).abs() <= 1.01 * ulps * info.eps * exact.abs() + slack).all())


def _write_index(plan: MergePlan, folder: Path) -> None:
    if plan.checkpoint.index is None:
        return
    where = {key: name for name, entries in plan.entries.items() for key in entries}
    metadata = {**plan.checkpoint.index.get("metadata", {}), "total_size": plan.nbytes}
    index = {"metadata": metadata, "weight_map": dict(sorted(where.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _copy_rest(plan: MergePlan, folder: Path) -> None:
    """Config, tokenizer, templates and licence from the base's directory; the config with what the merge changed."""
    source = plan.checkpoint.folder
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file() and not any(file.match(other) for other in NOT_COPIED):
                shutil.copyfile(file, folder / file.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates", dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(v for k, v in config.items() if k.endswith("_config") and isinstance(v, dict))):
        if plan.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        for key in ("dtype", "torch_dtype"):
            if plan.dtype is not None and key in part:
                part[key] = str(plan.dtype).removeprefix("torch.")
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

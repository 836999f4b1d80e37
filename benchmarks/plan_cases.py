"""The settings that benchmarks/bench_plan.py measures, and the configurations of their models."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072}
SHAPES = {
    "SmolLM2-135M": LLAMA | dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "Llama-3.2-1B": LLAMA | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, head_dim=64),
    "Qwen3-4B": dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_size=2560, intermediate_size=9728,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=True, max_position_embeddings=40960),
    "Llama-3.1-8B": LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
    "tiny": LLAMA | dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=8192, tie_word_embeddings=True),
    "small": LLAMA | dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=16384, tie_word_embeddings=False),
    "qwen-small": dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_size=384, intermediate_size=1152,
        num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2, head_dim=64, vocab_size=12288,
        tie_word_embeddings=True, max_position_embeddings=4096),
}  # fmt: skip
GPU_SHAPES = {"SmolLM2-135M": 0, "Llama-3.2-1B": 0, "Qwen3-4B": 12, "Llama-3.1-8B": 8}
"""The architectures of the grid, and how many of their layers it has (0: all)."""
LENGTHS = [[256] * 4, [512] * 16, [1024] * 2, [2048], [2048] * 4, [4096] * 2, [8192], [16384], [256] * 16]
MIXED = [900, 1500, 347, 1301]
RANKS, DIALS = (4, 16, 32, 64, 128), ("keep", "recompute", "recompute-offload", "offload", "mixed")
COMPILED_DIALS = ("keep", "selective", "mixed", "recompute", "offload", "recompute-offload")
SHARES = {"keep": 1.0, "selective": 0.85, "offload": 0.1, "mixed": 0.1, "recompute": 0.03, "recompute-offload": 0.01}


@dataclass(frozen=True)
class Case:
    """One setting. `layers` cuts the model; 0: all of them. `lengths` are the sequences of one row, `keep` is
    train.keep_blocks and `resident` train.resident_blocks."""

    shape: str
    layers: int
    quant: str
    lengths: tuple[int, ...]
    rank: int
    dial: str
    compile: bool = False
    stream: str = "off"
    keep: int = 0
    resident: int = 0

    @property
    def name(self) -> str:
        lengths = (
            f"{len(self.lengths)}x{self.lengths[0]}" if len(set(self.lengths)) == 1 else f"{sum(self.lengths)} mixed"
        )
        parts = [self.shape, f"{self.layers or 'all'} layers", self.quant, lengths, f"rank {self.rank}", self.dial]
        parts += [f"keep {self.keep}"] * (self.keep > 0)
        parts += ["compiled"] * self.compile + [f"stream {self.stream}"] * (self.stream != "off")
        return " ".join(parts + [f"resident {self.resident}"] * (self.resident > 0))


def eager_cases(shape: str, layers: int, at: int) -> list[Case]:
    """Eight eager settings of an architecture; `at` turns the wheel of lengths, ranks and dials."""
    found = []
    for i in range(8):
        turn = 9 * at + i
        lengths, rank = LENGTHS[(2 * turn) % len(LENGTHS)], RANKS[turn % 5]
        dial = DIALS[(at + i) % 5] if i != 5 else "keep"
        lengths = MIXED if i == 5 else lengths
        found.append(Case(shape, layers, ("none", "nf4")[(i + at) % 2], tuple(lengths), rank, dial))
    return found


def compiled_cases(shape: str, layers: int, at: int) -> list[Case]:
    """Each setting of the dial as `veneer train` runs it: packed linears and, where nothing is sent, CUDA graphs."""
    found = []
    for i, dial in enumerate(COMPILED_DIALS):
        turn = 5 * at + i
        lengths = MIXED if i == at else LENGTHS[1:8][turn % 7]
        found.append(Case(shape, layers, ("nf4", "none")[(i + at) % 2], tuple(lengths), RANKS[turn % 5], dial, True))
    return found


def resident_cases() -> list[Case]:
    """Streamed bases of which some blocks stay on the device, or all; few tokens, so that copies are what takes time."""
    return [
        Case("Llama-3.1-8B", 8, "none", (2048,), 16, "recompute", True, "host", resident=5),
        Case("Llama-3.1-8B", 8, "nf4", (1024,) * 2, 16, "recompute", True, "host", resident=3),
        Case("Qwen3-4B", 12, "none", (1024,) * 2, 16, "recompute-offload", stream="host", resident=7),
        Case("Llama-3.2-1B", 0, "nf4", (2048,), 32, "recompute", stream="host", resident=16),
    ]


def more_cases() -> list[Case]:
    """Streamed bases, blocks that stay (`keep_blocks`, `resident_blocks`), and whole models."""
    return [
        *resident_cases(),
        Case("Llama-3.1-8B", 0, "none", (2048,) * 4, 16, "mixed", True),
        Case("Llama-3.2-1B", 0, "none", (2048,) * 4, 16, "recompute", stream="host"),
        Case("Llama-3.1-8B", 0, "nf4", (2048,) * 4, 16, "recompute", True),
        Case("Qwen3-4B", 12, "none", (4096,) * 2, 64, "recompute-offload", stream="host"),
        Case("Llama-3.1-8B", 8, "nf4", (2048,) * 4, 16, "recompute", stream="host"),
        Case("SmolLM2-135M", 0, "none", (2048,) * 2, 16, "recompute", stream="host"),
        Case("Llama-3.1-8B", 8, "none", (2048,) * 4, 16, "mixed", True, "host"),
        Case("Llama-3.2-1B", 0, "nf4", (1024,) * 8, 32, "recompute", True, "host"),
        Case("Qwen3-4B", 12, "nf4", (1024,) * 4, 16, "offload", stream="host"),
        Case("Llama-3.1-8B", 0, "none", (2048,), 16, "keep"),
        Case("Qwen3-4B", 0, "none", (2048,) * 4, 16, "recompute"),
        Case("Llama-3.1-8B", 8, "none", (2048,) * 4, 16, "mixed", True, keep=3),
        Case("Llama-3.2-1B", 0, "none", (2048,) * 4, 32, "recompute", True, keep=5),
        Case("Qwen3-4B", 12, "none", (2048,) * 4, 16, "offload", keep=4),
        Case("Llama-3.1-8B", 0, "none", (2048,) * 4, 16, "selective", True),
        Case("Qwen3-4B", 0, "none", (2048,) * 4, 16, "selective", True),
    ]


def woven(lists: list[list[Case]]) -> list[Case]:
    """One of each list in turn."""
    return [case for case in chain.from_iterable(zip_longest(*lists)) if case is not None]


def gpu_cases() -> list[Case]:
    """All settings of the memory pass: those that take long (compiled, whole models) come early, two for each eager one,
    and what is cut short has some of everything."""
    shapes, more = list(enumerate(GPU_SHAPES.items())), more_cases()
    eager = woven([eager_cases(shape, layers, at) for at, (shape, layers) in shapes])
    compiled = woven([compiled_cases(shape, layers, at) for at, (shape, layers) in shapes])
    compiled = woven([[case for case in more if case.compile], compiled])
    eager = woven([[case for case in more if not case.compile], eager])
    return woven([compiled[::2], compiled[1::2], eager])


def speed_cases() -> list[Case]:
    """The settings of the speed pass, as users run them; streamed ones with as few tokens with no block that stays too."""
    some = [case for case in resident_cases() if case.compile]
    found = [resident_cases(), [replace(case, resident=0) for case in some]]
    for shape, layers in GPU_SHAPES.items():
        row = (2048,) * 4 if shape != "SmolLM2-135M" else (1024,) * 8
        found.append([
            Case(shape, layers, "none", row, 16, "selective", True),
            Case(shape, layers, "none", row, 16, "keep"),
            Case(shape, layers, "nf4", row, 16, "recompute", True),
            Case(shape, layers, "none", (512,) * 2, 16, "keep"),
            Case(shape, layers, "none", row, 32, "mixed", True),
            Case(shape, layers, "nf4", (2048,), 16, "recompute"),
        ])  # fmt: skip
    return woven(found)


def cpu_cases() -> list[Case]:
    lengths = [[64] * 4, [512], [256] * 2, [384, 100, 61, 50], [128], [768]]
    found, at = [], 0
    for shape, layers in (("tiny", 0), ("small", 4), ("qwen-small", 4), ("SmolLM2-135M", 3)):
        for row in lengths:
            dial = ("keep", "recompute", "offload")[(at + at // 3) % 3]
            found.append(Case(shape, layers, "none", tuple(row), RANKS[at % 5], dial))
            at += 1
    return found


def smoke_cases() -> list[Case]:
    tiny = [Case("tiny", 0, "none", (64, 64), 4, dial) for dial in ("keep", "recompute", "offload")]
    streamed = Case("tiny", 0, "none", (64, 64), 4, "recompute", stream="host")
    return [*tiny, streamed, replace(streamed, resident=2)]


def gigabytes(case: Case, resting: bool = False) -> float:
    """A rough upper bound of the device memory that a setting takes, by which settings are let onto one device at once;
    between its steps if `resting`."""
    shape, tokens = SHAPES[case.shape], sum(case.lengths)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    layers = case.layers or shape["num_hidden_layers"]
    block = 4 * hidden**2 + 3 * hidden * inner
    weights = 2 * (layers * block + 2 * shape["vocab_size"] * hidden)
    adapter = 16 * layers * case.rank * (11 * hidden + 4 * inner)
    kept = tokens * (30 * hidden + 10 * inner) * (0.5 if case.compile else 1)
    share = SHARES[case.dial] * (layers - case.keep) + case.keep
    graphs = 2 if case.compile and "offload" not in case.dial and case.dial != "mixed" else 1
    return (1.2 * weights + adapter + (1e9 if resting else graphs * kept * (share + 2) + 3e9)) / 1e9


def config_folder(case: Case) -> str:
    """A directory with the shape's config.json."""
    folder = Path(tempfile.mkdtemp(prefix="veneer-plan-"))
    values = dict(SHAPES[case.shape])
    if case.layers:
        values["num_hidden_layers"] = case.layers
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)

"""What things weigh: pure arithmetic over counts of numbers. All results are bytes; a GB is 10⁹ of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, prod
from operator import add
from typing import TYPE_CHECKING

from veneer.adapter.blocks import spread, staying
from veneer.plan import constants

if TYPE_CHECKING:
    from veneer.plan.profile import Block, Profile

NF4_BLOCK, NF4_BLOCKS = 64, 256
"""Numbers that share a scale, and scales that share a scale of their own (QLoRA, arXiv:2305.14314, section 3)."""
BFLOAT16, FLOAT32 = 2, 4
MOMENTS = 2
"""AdamW keeps two running means for each number that it trains (arXiv:1711.05101)."""

SENT = "recompute-offload", "offload", "mixed"
"""The modes of a block that send what they keep to the host: `training.store`."""
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of a number by dtype, in the order in which a safetensors file holds them."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one way of training holds all the time. Activations, which depend on the batch, are not in it."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def as_dict(self) -> dict[str, int]:
        return {key: round(value) for key, value in (asdict(self) | {"total": self.total}).items()}


def nf4(numbers: int) -> float:
    """A weight of so many numbers in NF4 with double quantisation: 4 bits each, an 8-bit scale for every 64 of them and
    a float32 scale for every 256 of those: 0.516 bytes a number."""
    blocks = ceil(numbers / NF4_BLOCK)
    return ceil(numbers / 2) + blocks + FLOAT32 * ceil(blocks / NF4_BLOCKS)


def gradients(numbers: int, each: int = FLOAT32) -> int:
    """One number for each that is trained: 28 GB for 7 billion in float32."""
    return numbers * each


def full(numbers: int) -> Memory:
    """Full fine-tuning with AdamW in float32: 16 bytes a number.

    Mixed precision holds as much: bfloat16 weights and gradients, and the optimiser's float32 copy of the weights
    (ZeRO, arXiv:1910.02054, section 3.1).
    """
    return Memory(FLOAT32 * numbers, gradients(numbers), MOMENTS * FLOAT32 * numbers)


def adapter_only(base: float, adapter: int, trained: int) -> Memory:
    """LoRA or QLoRA on a frozen base, all in bytes: of the base, of what the adapter holds, and of what is trained in it
    (in the dtype it is trained in, which gradients and moments share)."""
    return Memory(base + adapter, trained, MOMENTS * trained)


def safetensors_size(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    """The size of the file that holds these tensors, name → (dtype as the format names it, shape): header included."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, order = 0, list(SIZES)
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        end = offset + SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + ceil(length / 8) * 8 + offset


@dataclass(frozen=True)
class Setting:
    """One way to run a step. `micro_tokens` are those of a row, in sequences of `sequence`; `tokens` those of a step.

    `dial` is train.checkpointing, `keep` train.keep_blocks, `stream` where the frozen blocks live: off (on the device),
    host or disk, `resident` how many of them stay on the device all the same (train.resident_blocks), `embedding` where the
    input embedding's table is: device or host. `graphs`: rows run as CUDA graphs once they were seen.
    """

    quant: str
    dial: str
    micro_tokens: int
    sequence: int
    tokens: int
    optimizer: str = "adamw"
    compile: bool = False
    stream: str = "off"
    keep: int = 0
    graphs: bool = False
    embedding: str = "device"
    resident: int = 0

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return max(1, ceil(self.tokens / self.micro_tokens))


@dataclass(frozen=True)
class Need:
    """Bytes that a step needs at its peak. `allocated` is the sum of the parts, `reserved` what the allocator takes for
    it (`pool`: what CUDA graphs keep to themselves, as much as a row takes), `total` that and what the device or process
    holds besides. `host` is host memory beside a GPU (else 0)."""

    base: float
    adapter: float
    gradients: float
    optimizer: float
    kept: float
    work: float
    head: float
    workspace: float
    pool: float
    slack: float
    context: float
    host: float
    at: str

    @property
    def allocated(self) -> float:
        return (
            self.base
            + self.adapter
            + self.gradients
            + self.optimizer
            + self.kept
            + self.work
            + self.head
            + self.workspace
        )

    @property
    def reserved(self) -> float:
        return self.allocated + self.pool + self.slack

    @property
    def total(self) -> float:
        return self.reserved + self.context

    @property
    def wanted(self) -> float:
        """Bytes of the device that a run is given for it: the prediction and the margin."""
        return self.total * (1 + constants.MARGIN)

    def as_dict(self) -> dict[str, int | str]:
        values = asdict(self) | {"allocated": self.allocated, "reserved": self.reserved, "total": self.total}
        return {key: value if isinstance(value, str) else round(value) for key, value in values.items()}


def packed(numbers: int, quant: str, each: int) -> float:
    """A matrix of so many numbers as `quant` holds it (none: `each` bytes a number). int8 has a float32 for each row,
    here taken as one for 4096 numbers; the 4-bit ones but nf4 and fp4 a scale and a zero of 2 bytes for 64."""
    if quant == "none":
        return numbers * each
    if quant in ("nf4", "fp4"):
        return nf4(numbers)
    return numbers * (1 + 4 / 4096) if quant.startswith("int8") else numbers * (0.5 + 4 / 64)


def unpacked(numbers: int, quant: str, each: int) -> float:
    """What a linear makes for a moment of its quantised weight: a float copy, and for int8 one more on the way; NF4's
    block scales in float32 besides."""
    if quant == "none":
        return 0.0
    copies = 2 if quant.startswith("int8") else 1
    return numbers * each * copies + (FLOAT32 * numbers / NF4_BLOCK if quant in ("nf4", "fp4") else 0)


def modes_of(setting: Setting, blocks: int) -> list[str]:
    """A mode for each block. A streamed base does not keep: `training.streamed`."""
    dial = "recompute" if setting.stream != "off" and setting.dial == "keep" else setting.dial
    return spread(dial, blocks, setting.keep, compiled=setting.compile)


def packs(setting: Setting) -> bool:
    """Whether linears of one input are packed into one matrix, as compiled blocks have it."""
    return setting.compile and (setting.stream == "off" or setting.quant in ("none", "nf4", "fp4"))


def unpacks_rows(setting: Setting) -> bool:
    """Whether each row makes float copies of quantised weights; of a packed streamed base each arriving block does."""
    return setting.quant != "none" and not (packs(setting) and setting.stream != "off")


def can_have_graphs(setting: Setting) -> bool:
    """Whether rows of this setting can run as CUDA graphs: `training.graphs`."""
    return setting.stream == "off" and setting.dial not in SENT


def embedding_away(profile: Profile, setting: Setting) -> bool:
    """Whether the embedding's table is in host memory by `train.embedding`."""
    return setting.embedding == "host" and setting.stream == "off" and profile.movable > 0


def chunked(setting: Setting, mode: str) -> bool:
    """Whether a block takes its MLP in chunks: of a streamed base, for long rows, where it recomputes
    (`training.chunks`)."""
    return setting.stream != "off" and setting.micro_tokens > constants.LONG and mode.startswith("recompute")


def block_bytes(block: Block, quant: str, each: int) -> float:
    """The frozen weights of one block."""
    return sum(packed(n, quant, each) for n in block.linears) + block.other * each


def blocks_bytes(profile: Profile, quant: str) -> list[float]:
    """The frozen weights of each block."""
    known = {key: block_bytes(b, quant, profile.dtype_bytes) for key, b in {id(b): b for b in profile.blocks}.items()}
    return [known[id(block)] for block in profile.blocks]


def passing(setting: Setting, blocks: int) -> list[int]:
    """Which blocks of a streamed base come and go."""
    stay = staying(blocks, setting.resident)
    return [i for i in range(blocks) if i not in stay]


def slots(setting: Setting, passing: int) -> int:
    """Buffers that so many passing blocks of a streamed base go through (`base.stream.Conveyor`). A packed base's blocks
    leave theirs as they are moved to where they are computed with, so it has one."""
    return min(1 if packs(setting) else constants.STREAM_BUFFERS, passing)


def copied(setting: Setting, blocks: int) -> list[int]:
    """Which blocks of a streamed base are copied in a pass over them: what the pass before left in the buffers, from whose
    other end it came, is there."""
    found = passing(setting, blocks)
    return found[slots(setting, len(found)) :]


def base_bytes(profile: Profile, setting: Setting) -> float:
    """The frozen weights on the device. Of a streamed base those blocks that stay, a few others and two pieces of the head
    are; a packed one has besides the blocks as they come one as it is computed with, which blocks that stay pass too."""
    each = profile.dtype_bytes
    blocks = blocks_bytes(profile, setting.quant)
    beside = [block.beside * each if packs(setting) else 0 for block in profile.blocks]
    if setting.stream == "off":
        away = profile.movable if embedding_away(profile, setting) else 0
        return sum(blocks) + sum(beside) + (profile.embedding - away + profile.head + profile.rest) * each
    head = (profile.head or profile.embedding) * each
    come = passing(setting, len(blocks))
    buffers = sum(blocks) - sum(blocks[i] for i in come)
    buffers += slots(setting, len(come)) * max((blocks[i] for i in come), default=0.0)
    if packs(setting):
        buffers += max(map(add, blocks_bytes(profile, "none"), beside))
    return buffers + min(head, 2 * constants.STREAM_HEAD_CHUNK) + profile.rest * each


def optimizer_bytes(profile: Profile, optimizer: str) -> tuple[float, float]:
    """AdamW's moments on the device and in host memory: float32 ones, or 8-bit ones with a float32 for 256 of them."""
    eight = "8bit" in optimizer
    states = MOMENTS * profile.trained * (1 + 4 / 256 if eight else FLOAT32)
    return (0.0, states) if optimizer.startswith("paged") else (states, 0.0)


def chunk_bytes(vocabulary: int, tokens: int, each: int, cuda: bool) -> float:
    """Logits and their gradients of the loss: one chunk, where there are several the last one's gradients too. On a GPU
    gradients lie where the logits did, elsewhere beside them."""
    limit, each = (constants.GPU_CHUNK, each) if cuda else (constants.CPU_CHUNK, FLOAT32)
    rows = max(1, limit // (each * vocabulary))
    rows = min(rows, max(constants.GPU_CHUNK_ROWS, tokens // 4)) if cuda else rows
    full, rest = divmod(tokens, rows)
    chunks = [rows] * min(full, 2) + [rest] * (rest > 0)
    own = 1 if cuda else 2
    return max(before + own * rows for before, rows in zip([0, *chunks], chunks)) * vocabulary * each


def streamed_chunk_bytes(hidden: int, vocabulary: int, tokens: int, each: int) -> float:
    """The same where the head comes in pieces: a piece's logits, their gradients and float32 between them, and a running
    sum of the size of the hidden states in float32."""
    rows = min(tokens, constants.STREAM_HEAD_ROWS)
    logits = min(rows * vocabulary * each, constants.STREAM_LOGITS, rows * constants.STREAM_HEAD_CHUNK // hidden)
    return 2 * logits + rows * hidden * 2 * FLOAT32


def kept_bytes(block: Block, mode: str, tokens: int, compiled: bool) -> tuple[float, float]:
    """What a block keeps for its backward pass after its forward pass, in bytes: on the device, and in host memory."""
    low, stays = 0.0, 0.0
    if mode.startswith("recompute"):
        kept = block.inputs(tokens)
    elif compiled:
        low, stays = low_bytes(block, tokens)
        kept = block.inputs(tokens) + constants.KEPT_MIXED * block.widest * tokens
        if mode != "mixed":
            kept = block.dear(tokens)
        kept += constants.NORMS * block.inputs(tokens) + block.widened(tokens) if mode == "keep" else 0.0
    else:
        kept = block.kept(tokens)
    if mode not in SENT:
        return kept + low, 0.0
    if mode == "recompute-offload" or compiled:
        sent = 0.0 if block.inputs(tokens) < constants.SMALL else kept + low - stays
        return kept + low - sent, sent
    sizes = [each * tokens for each in block.parcels]
    sent = sum(size for size in sizes if size >= constants.SMALL)
    return kept * (1 - sent / max(1.0, sum(sizes))), sent


def kind(mode: str) -> str:
    """Which of the constants by mode holds for a block: whether its products are kept, computed again, or some of each."""
    return mode if mode == "mixed" else "recompute" if mode.startswith("recompute") else "keep"


def low_bytes(block: Block, tokens: int) -> tuple[float, float]:
    """x Aᵀ of a compiled block's packed groups, and what of it is not sent to the host: small ones, and those of more
    than two linears, of which a slice for each is kept (`kernels.group`)."""
    sizes = [(each * tokens, members > constants.JOINED) for each, members in block.lows]
    return sum(n for n, _ in sizes), sum(n for n, sliced in sizes if sliced or n < constants.SMALL)


def copy_bytes(block: Block, mode: str, setting: Setting, each: int) -> float:
    """The float copies of quantised weights that a block makes of one matrix, or of packed ones, at its peak."""
    if not unpacks_rows(setting):
        return 0.0
    sizes, times = (block.groups, constants.UNPACKS[kind(mode)]) if packs(setting) else (block.linears, 1.0)
    return times * max((unpacked(n, setting.quant, each) for n in sizes), default=0.0)


def work_bytes(block: Block, mode: str, setting: Setting, each: int) -> float:
    """The most that a block needs while it runs, over what was there before it: all that it keeps, temporaries, the
    gradient of its output, and the float copy of a quantised weight."""
    tokens, copy = setting.micro_tokens, copy_bytes(block, mode, setting, each)
    if chunked(setting, mode):
        most = constants.LONG_WORK * (1 - block.wide_share) * block.kept(tokens) + 2 * block.inputs(tokens)
        return max(most, block.forward_peak(constants.CHUNK)) + copy
    if setting.compile:
        most = block.dear(tokens) + block.widened(tokens) + low_bytes(block, tokens)[0]
        most += constants.NORMS * block.inputs(tokens) if mode == "keep" else 0.0
        most += constants.WORK_WIDE[kind(mode)] * block.widest * tokens
        return most + constants.WORK_INPUTS * block.inputs(tokens) + copy
    most = max(block.backward_peak(tokens), block.forward_peak(tokens), block.kept(tokens) + copy)
    if mode.startswith("recompute"):
        most = max(most, block.forward_peak(tokens) + block.inputs(tokens))
    if mode in SENT[1:]:  # what several operations save comes back as often
        kept, sent = kept_bytes(block, mode, tokens, False)
        most += max(0.0, sent + kept - block.kept(tokens))
    return most + constants.EAGER_WORK * block.kept(tokens)


def need(profile: Profile, setting: Setting, *, cuda: bool = True, context: float | None = None) -> Need:
    """The peak of a step: the most of all blocks' turns and of the loss. `context` is what a device (or, without CUDA, a
    process) holds besides; absent: the measured default."""
    each, tokens = profile.dtype_bytes, setting.micro_tokens
    modes = modes_of(setting, len(profile.blocks))
    rows = setting.rows if setting.stream != "off" else 1  # all rows of a step pass through a block before the next
    here, away, peaks = profile.embed_kept(tokens) * rows, 0.0, []
    last: list[float] = []
    there_still: list[float] = []  # of what was sent, each tensor once: several operations may save the same one
    known: dict[tuple[int, str], tuple[float, float, float]] = {}
    for block, mode in zip(profile.blocks, modes):
        if (key := (id(block), mode)) not in known:
            work = work_bytes(block, mode, setting, each)
            known[key] = *kept_bytes(block, mode, tokens, setting.compile), work
        kept, sent, work = known[key]
        behind = constants.AHEAD - 1 if mode in SENT else constants.AHEAD  # a block that sends nothing waits for none
        travelling = sum(last[-behind:])
        peaks.append((here + travelling, work, 0.0, "a block's backward pass"))
        here, away = here + kept * rows, away + sent * rows
        here += 0.0 if cuda else sent * rows  # the host's memory is the device's, and holds both copies
        if mode in SENT:
            last.append(sent)
            there_still.append(sent if setting.compile else min(sent, max(0.0, block.kept(tokens) - kept)))
    left = here + sum(there_still[-constants.AHEAD :])
    left += sum(there_still[-1:]) * (rows - 1) if setting.stream != "off" else 0.0
    chunk, positions = chunk_bytes(profile.vocabulary, tokens, each, cuda), tokens
    if setting.stream != "off" and (profile.head or profile.embedding) * each > constants.STREAM_HEAD_CHUNK:
        positions = max(tokens, min(setting.tokens, constants.STREAM_HEAD_ROWS))  # rows share a pass over the head
        chunk = streamed_chunk_bytes(profile.hidden, profile.vocabulary, positions, each)
    there = profile.head_end(positions) + (constants.HEAD_INPUTS * profile.hidden * each * positions if cuda else 0.0)
    peaks.append((left, there, chunk, "the loss"))
    peaks.append((left, max(profile.head_peak(tokens), profile.tail_peak(tokens)), 0.0, "the final norm"))
    kept, work, head, at = max(peaks, key=lambda peak: sum(peak[:3]))
    moments, paged = optimizer_bytes(profile, setting.optimizer)
    parts = {
        "base": base_bytes(profile, setting),
        "adapter": profile.adapter_bytes,
        "gradients": profile.trained_bytes,
        "optimizer": moments,
        "kept": kept,
        "work": work,
        "head": head,
        "workspace": constants.WORKSPACE * (2 if setting.graphs else 1) if cuda else 0.0,
    }
    own = kept + work + head
    fixed = constants.RESERVED_FIXED * (2 if setting.graphs else 1)
    slack = fixed + constants.RESERVED * own + constants.RESERVED_WORK * (work + head)
    if not cuda:
        slack = constants.HOST_SLACK * sum(value for key, value in parts.items() if key not in ("base", "adapter"))
    besides = context if context is not None else constants.CONTEXT if cuda else constants.HOST_BASELINE
    held = 0.0
    if setting.stream == "host":  # those that stay on the device too: what modules see between their turns
        held = sum(blocks_bytes(profile, setting.quant)) + (profile.embedding + profile.head) * each
    table = profile.movable * each if embedding_away(profile, setting) else 0
    if not cuda:
        parts["base"] += held + table
    host = constants.HOST_RUN + away * constants.PINNED + paged + held + table if cuda else 0.0
    pool = constants.POOL * own + constants.POOL_WORK * work if setting.graphs and cuda else 0.0
    return Need(**parts, pool=pool, slack=slack, context=besides, host=host, at=at)

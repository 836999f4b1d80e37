"""How long a step takes: each operation as long as its FLOPs or its bytes need, whichever is longer (Williams et al. 2009,
doi:10.1145/1498765.1498785), copies beside the computation, and never less than starting the kernels takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from veneer.plan import bytes as size
from veneer.plan import constants
from veneer.plan.profile import Block, Op, Profile


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: `products` FLOPs of a large product in the base's dtype, bytes of its own memory
    (`bandwidth`), between host and device (`copy`) and from `disk`. `call`: seconds to start an operation; `queued`: that
    happens while earlier ones still run, as on a GPU."""

    products: float
    bandwidth: float
    copy: float
    disk: float
    call: float
    queued: bool = True

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    @property
    def of_layers(self) -> tuple[float, float]:
        """FLOPs of a layer's products and bytes of its element-wise operations in a second."""
        shares = constants.PRODUCT_SHARE, constants.MOVE_SHARE
        products, moves = shares if self.queued else constants.HOST_SHARES
        return self.products * products, self.bandwidth * moves


@dataclass(frozen=True)
class Time:
    """Seconds of a step: `compute` and `copies` if each were alone, `total` with what runs beside each other."""

    compute: float
    copies: float
    total: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


def of_ops(
    ops: Iterable[Op],
    tokens: int,
    rates: Rates,
    compiled: bool,
    graphs: bool = False,
    beside: float = 0.0,
    starts: int = 0,
) -> float:
    """Seconds of some operations on a row, and of what goes with them: `beside` seconds, `starts` operations started. In
    a CUDA graph nothing waits for a kernel to be started."""
    (products, bandwidth), count = rates.of_layers, 0
    least = constants.KERNEL_SECONDS if rates.queued else 0.0
    total = beside + starts * least
    for op in ops:
        flops, moved = op.flops(tokens), op.moved(tokens)
        if not flops and compiled:
            moved *= constants.FUSED
        total += max(flops / products, moved / bandwidth, 0.0 if compiled and not flops else least)
        count += 1
    if not rates.queued:
        return total + count * rates.call
    calls = constants.COMPILED_CALLS if compiled else constants.EAGER_CALLS
    return max(total, 0.0 if graphs else (count + starts) * rates.call * calls)


def attention(block: Block, tokens: int, sequence: int, rates: Rates) -> float:
    """Seconds of one forward pass: 4·T·keys·heads·width FLOPs, where a token sees half its sequence on average."""
    keys = min(sequence / 2, block.window or sequence)
    return 4 * tokens * keys * block.heads / (rates.products * constants.ATTENTION_SHARE)


def unpacking(block: Block, quant: str, each: int, rates: Rates) -> float:
    """Seconds to make the float copies of a block's quantised weights, once."""
    if quant == "none":
        return 0.0
    moved = sum(size.packed(n, quant, each) + n * each for n in block.linears)
    return moved / (rates.bandwidth * constants.UNPACK_SHARE)


def arriving(block: Block, setting: size.Setting, each: int, rates: Rates) -> float:
    """Seconds to bring a packed streamed block from where it came, or stays, to where it is computed with: float weights are
    moved there, quantised ones unpacked."""
    if setting.stream == "off" or not size.packs(setting):
        return 0.0
    moved = 2 * size.block_bytes(block, "none", each) / rates.of_layers[1]
    return moved if setting.quant == "none" else unpacking(block, setting.quant, each, rates)


def step(profile: Profile, setting: size.Setting, rates: Rates) -> Time:
    """Seconds of one optimiser step."""
    each, tokens, compiled = profile.dtype_bytes, setting.micro_tokens, setting.compile
    streamed = setting.stream != "off"
    comes = set(size.copied(setting, len(profile.blocks))) if streamed else set()
    weights = size.blocks_bytes(profile, setting.quant) if streamed else []
    modes = size.modes_of(setting, len(profile.blocks))
    passes = [[0.0, 0.0], [0.0, 0.0]]
    """Seconds of compute and of copies, forward and backward."""
    times: dict[tuple[int, str], tuple[float, float]] = {}
    for i, (block, mode) in enumerate(zip(profile.blocks, modes)):
        if (key := (id(block), mode)) not in times:
            times[key] = _turns(profile, block, mode, setting, rates)
        _, away = size.kept_bytes(block, mode, tokens, compiled)
        sent = away * setting.rows / rates.copy
        if i in comes:
            sent += weights[i] / (rates.copy if setting.stream == "host" else min(rates.copy, rates.disk))
        for way, seconds in zip(passes, times[key]):
            way[0], way[1] = way[0] + seconds * setting.rows, way[1] + sent
    if streamed:
        passes[0][1] += (profile.head or profile.embedding) * each / rates.copy
    compute, copies = (sum(way[at] for way in passes) for at in (0, 1))
    total = sum(max(way) + min(way) * (1 - constants.OVERLAP) for way in passes)
    rest = _head(profile, setting, rates) * setting.rows + 7 * size.FLOAT32 * profile.trained / rates.bandwidth
    rest += constants.STEP_SECONDS if rates.queued else 0.0
    if size.embedding_away(profile, setting):
        rest += setting.tokens * profile.hidden * each / rates.copy
    return Time(compute + rest, copies, total + rest, setting.tokens)


def _turns(profile: Profile, block: Block, mode: str, setting: size.Setting, rates: Rates) -> tuple[float, float]:
    """Seconds of a block's forward and backward pass on one row; what is done once for all rows, by row."""
    tokens, compiled = setting.micro_tokens, setting.compile
    seen = attention(block, tokens, setting.sequence, rates)
    float_copy = unpacking(block, setting.quant, profile.dtype_bytes, rates) if size.unpacks_rows(setting) else 0.0
    once = arriving(block, setting, profile.dtype_bytes, rates) / setting.rows
    starts = constants.UNPACK_CALLS * len(block.linears) if setting.quant != "none" and not compiled else 0
    forward, backward = (
        of_ops(ops, tokens, rates, compiled, setting.graphs, seen * share + float_copy, starts)
        for ops, share in ((block.forward_ops, 1), (block.backward_ops, constants.ATTENTION_BACKWARD))
    )
    return forward + once, backward + forward * _again(mode, compiled) + once


def _again(mode: str, compiled: bool) -> float:
    """The share of its forward pass that a block does again in its backward pass."""
    if mode == "mixed":
        return constants.AGAIN_MIXED
    if not mode.startswith("recompute"):
        return 0.0
    return constants.AGAIN_COMPILED if compiled else 1.0


def _head(profile: Profile, setting: size.Setting, rates: Rates) -> float:
    """Embedding, final norm and the loss of a row: two products with the head, and some passes over its logits."""
    tokens, (rate, bandwidth) = setting.micro_tokens, rates.of_layers
    products = 4 * tokens * profile.vocabulary * profile.hidden / rate
    passes = 3 if rates.queued else 9  # one compiled kernel, or one pass for each operation
    logits = passes * tokens * profile.vocabulary * profile.dtype_bytes / bandwidth
    return of_ops(profile.head_ops, tokens, rates, False, setting.graphs) + products + logits

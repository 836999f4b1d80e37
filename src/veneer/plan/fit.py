"""Find the settings of a run that fit a budget, and the fastest of them by prediction; say why the others were not taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import inf
from typing import Any

from veneer.errors import PlanError
from veneer.plan import bytes as size
from veneer.plan.profile import Profile
from veneer.plan.roofline import Rates, Time, step

AXES: dict[str, tuple[Any, ...]] = {
    "quant": ("none", "nf4"),
    "stream": ("off", "host", "disk"),
    "dial": ("keep", "selective", "mixed", "offload", "recompute", "recompute-offload"),
    "optimizer": ("adamw", "adamw-8bit", "paged-adamw-8bit"),
    "embedding": ("device", "host"),
}
"""What is searched, each from the plainest to the most saving; besides them the tokens of a row."""
SAME = 1.02
"""Settings whose predicted times differ by less are as fast as each other: the plainer one is taken."""


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take: of the device, and of host memory beside it (None: no limit). On a CPU `device` is the
    process's memory and `cuda` false. `context` is what the device or process holds besides tensors, if measured."""

    device: float
    host: float | None = None
    cuda: bool = True
    context: float | None = None


@dataclass(frozen=True)
class Option:
    """A setting with what it needs and takes; `reason` says why it does not fit, or is empty."""

    setting: size.Setting
    need: size.Need
    time: Time
    reason: str = ""

    @property
    def wanted(self) -> float:
        """Bytes of the device that a run is given for it: the prediction and the margin."""
        return self.need.wanted

    def as_dict(self) -> dict[str, Any]:
        return {
            "setting": asdict(self.setting),
            "need": self.need.as_dict(),
            "wanted": round(self.wanted),
            "time": self.time.as_dict(),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Why:
    """An option of one axis that was not taken, at its best: its reason, and the setting it was judged by."""

    axis: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """The chosen setting, the next ones by predicted time, one reason for each option that was not taken, and the steps
    down in memory from the chosen one: what a run falls back to."""

    model: str
    budget: Budget
    chosen: Option
    runners_up: list[Option]
    not_taken: list[Why]
    steps_down: list[Option]

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "budget": asdict(self.budget),
            "chosen": self.chosen.as_dict(),
            "runners_up": [option.as_dict() for option in self.runners_up],
            "not_taken": [asdict(why) for why in self.not_taken],
            "steps_down": [option.as_dict() for option in self.steps_down],
        }


@dataclass(frozen=True)
class Wish:
    """The work of a step: sequences of up to `sequence` tokens, `tokens` in all; `fixed` has what the user chose of
    quant, stream, dial, optimizer, embedding, micro_tokens, keep, resident. `compile` says whether blocks are compiled."""

    sequence: int
    tokens: int
    fixed: Mapping[str, Any]
    compile: bool = True


def options(profile: Profile, budget: Budget, rates: Rates, wish: Wish) -> list[Option]:
    """Every setting that the user left open, judged."""
    axes = {axis: (wish.fixed[axis],) if axis in wish.fixed else values for axis, values in AXES.items()}
    if not budget.cuda:
        plain = {"quant": ("none",), "stream": ("off", "disk"), "dial": ("keep", "recompute"), "optimizer": ("adamw",)}
        plain["embedding"] = ("device",)
        axes = {axis: axes[axis] if axis in wish.fixed else plain[axis] for axis in axes}
    if profile.stored and "quant" not in wish.fixed:
        axes["quant"] = ("none",)
    elif not wish.compile and "dial" not in wish.fixed:  # selective is keep where nothing is compiled
        axes["dial"] = tuple(dial for dial in axes["dial"] if dial != "selective")
    rows = [wish.fixed["micro_tokens"]] if "micro_tokens" in wish.fixed else row_sizes(wish.sequence, wish.tokens)
    found = []
    for quant, stream, dial, optimizer, embedding, micro in product(*axes.values(), rows):
        if stream != "off" and dial == "keep" and "dial" not in wish.fixed:
            continue  # is recompute there
        setting = size.Setting(
            quant, dial, micro, wish.sequence, wish.tokens, optimizer, wish.compile, stream,
            keep=wish.fixed.get("keep", 0), embedding=embedding,
            resident=wish.fixed.get("resident", 0) if stream != "off" else 0,
        )  # fmt: skip
        if embedding == "host" and "embedding" not in wish.fixed and not size.embedding_away(profile, setting):
            continue  # its table stays where it is
        found.append(judge(profile, budget, rates, setting))
    return found


def spending(profile: Profile, budget: Budget, rates: Rates, wish: Wish, every: list[Option]) -> list[Option]:
    """Settings that fit with what is left of the memory spent on as many blocks as there is room for: on the last ones that
    keep all the same, where the dial saves memory; on those of a streamed base that stay on the device; on both, the first
    ones first."""
    fitting = sorted((o for o in every if not o.reason), key=lambda o: o.time.total)
    kept = [] if "keep" in wish.fixed else with_kept_blocks(profile, budget, rates, fitting)
    if "resident" in wish.fixed:
        return kept
    return kept + with_resident_blocks(profile, budget, rates, [*fitting, *kept])


def with_kept_blocks(profile: Profile, budget: Budget, rates: Rates, fitting: Iterable[Option]) -> list[Option]:
    """The fastest of each kind that saves memory, with as many of the last blocks kept as fit, where that is any."""
    found: dict[tuple, Option] = {}
    for option in fitting:
        if option.setting.dial not in ("keep", "selective"):
            found.setdefault(_same(option), option)
    tried = (most(profile, budget, rates, option, "keep") for option in found.values())
    return [option for option in tried if option is not None]


def with_resident_blocks(profile: Profile, budget: Budget, rates: Rates, fitting: Iterable[Option]) -> list[Option]:
    """Streamed settings with as many blocks on the device as fit, where that is any. Rows matter: smaller ones leave room for
    more blocks. Only those that would be the fastest of their kind with no copies at all are tried."""
    found: list[Option] = []
    best: dict[tuple, float] = {}
    for option in fitting:
        key = _same(option)
        if option.setting.stream == "off" or option.time.compute > best.get(key, inf):
            continue
        more = most(profile, budget, rates, option, "resident")
        best[key] = min(best.get(key, inf), (more or option).time.total)
        found += [more] if more is not None else []
    return found


def most(profile: Profile, budget: Budget, rates: Rates, option: Option, what: str) -> Option | None:
    """The setting with the most blocks in `what` (keep or resident) that fits; None where not one does."""
    low, high, plain = 0, len(profile.blocks), replace(option.setting, graphs=False)
    while low < high:
        middle = (low + high + 1) // 2
        need = size.need(profile, replace(plain, **{what: middle}), cuda=budget.cuda, context=budget.context)
        low, high = (low, middle - 1) if lacking(need, budget) else (middle, high)
    return judge(profile, budget, rates, replace(plain, **{what: low})) if low else None


def row_sizes(sequence: int, tokens: int) -> list[int]:
    """Tokens of a row: one sequence and up by doubling, to the whole step."""
    sizes, at = [], sequence
    while at < tokens:
        sizes.append(at)
        at *= 2
    return [*sizes, max(tokens, sequence)]


def judge(profile: Profile, budget: Budget, rates: Rates, setting: size.Setting) -> Option:
    """One setting against a budget; with CUDA graphs where it can have them and there is room for what they keep."""
    graphs = budget.cuda and size.can_have_graphs(setting) and not setting.graphs
    for tried in (replace(setting, graphs=True), setting) if graphs else (setting,):
        need = size.need(profile, tried, cuda=budget.cuda, context=budget.context)
        if not (reason := lacking(need, budget)):
            break
    return Option(tried, need, step(profile, tried, rates), reason)


def lacking(need: size.Need, budget: Budget) -> str:
    """Why this does not fit; empty if it does."""
    if need.wanted > budget.device:
        return f"needs {text(need.wanted)}"
    if budget.host is not None and need.host > budget.host:
        return f"needs {text(need.host)} of host memory"
    return ""


def find(profile: Profile, budget: Budget, rates: Rates, wish: Wish) -> Plan:
    """The plan for a budget. Raises `PlanError` where nothing fits, with the least that would and what to change."""
    every = options(profile, budget, rates, wish)
    plain = every if not wish.fixed.get("resident") else options(profile, budget, rates, _without(wish, "resident"))
    every = every + spending(profile, budget, rates, wish, every)
    fitting = ranked(option for option in every if not option.reason)
    if not fitting:
        raise PlanError(nothing_fits(profile, budget, rates, wish, every))
    chosen = fitting[0]
    return Plan(
        model=profile.name,
        budget=budget,
        chosen=chosen,
        runners_up=_different(fitting[1:], chosen),
        not_taken=_not_taken(every, chosen),
        steps_down=steps_down(plain, chosen),
    )


def ranked(options: Iterable[Option]) -> list[Option]:
    """By time, in classes of those within `SAME` of their fastest; within one the plainer setting, then the one that needs
    less."""
    found: list[Option] = []
    group: list[Option] = []
    for option in sorted(options, key=lambda option: option.time.total):
        if group and option.time.total > SAME * group[0].time.total:
            found += sorted(group, key=_plain)
            group = []
        group.append(option)
    return found + sorted(group, key=_plain)


def _plain(option: Option) -> tuple:
    s = option.setting
    plain = tuple(AXES[axis].index(v) if (v := getattr(s, axis)) in AXES[axis] else 0 for axis in AXES)
    return plain, option.need.total


def _different(fitting: Iterable[Option], chosen: Option, count: int = 3) -> list[Option]:
    """The next best that differ in more than the tokens of a row."""
    found: list[Option] = []
    for option in fitting:
        if all(_kind(option) != _kind(other) for other in [chosen, *found]):
            found.append(option)
    return found[:count]


def _kind(option: Option) -> tuple:
    return tuple(getattr(option.setting, axis) for axis in ("quant", "stream", "dial"))


def _same(option: Option) -> tuple:
    """All but how the tokens of a step are cut into rows, and which blocks are treated otherwise."""
    return tuple(getattr(option.setting, axis) for axis in AXES)


def _not_taken(every: list[Option], chosen: Option) -> list[Why]:
    """For each value of each axis the reason why it was not taken, at the best that goes with it."""
    found = []
    for axis in (*AXES, "resident", "micro_tokens"):
        for value in dict.fromkeys(getattr(option.setting, axis) for option in every):
            if value == getattr(chosen.setting, axis) or (axis == "resident" and value):
                continue
            own = [option for option in every if getattr(option.setting, axis) == value]
            fitting = [option for option in own if not option.reason]
            if fitting:
                best = ranked(fitting)[0]
                slower = best.time.total / chosen.time.total - 1
                reason = f"{slower:.0%} slower" if slower >= SAME - 1 else "no faster"
                found.append(Why(axis, value, f"{reason}, in {text(best.wanted)}"))
            else:
                least = min(own, key=lambda option: option.need.total)
                found.append(Why(axis, value, f"does not fit: {least.reason} at least"))
    return found


def steps_down(every: list[Option], chosen: Option) -> list[Option]:
    """What a run can change to in its midst without loading the base anew, each needing less on the device than the one
    before: no blocks kept, none that stay of a streamed base, another dial, or smaller rows. The fastest way down."""
    same = ("quant", "stream", "optimizer", "embedding")
    near = [
        option
        for option in every
        if all(getattr(option.setting, axis) == getattr(chosen.setting, axis) for axis in same)
        and option.setting.micro_tokens <= chosen.setting.micro_tokens
    ]
    found, last = [], chosen
    for option in sorted(near, key=lambda option: option.time.total):
        if option.need.allocated < last.need.allocated * 0.97 and option.time.total >= chosen.time.total:
            found.append(option)
            last = option
    return found


def nothing_fits(profile: Profile, budget: Budget, rates: Rates, wish: Wish, every: list[Option]) -> str:
    """One line: the least that would fit, with which settings, and what to change."""
    least = min(every, key=lambda option: option.need.total)
    line = f"nothing fits {text(budget.device)}: the least is {text(least.wanted)}, with {describe(least.setting)}"
    if least.wanted <= budget.device:
        near = [o for o in every if o.wanted <= budget.device]
        host = min(near, key=lambda option: option.need.host)
        line = f"{text(budget.host)} of host memory are too little: {describe(host.setting)} {host.reason}"
    hints = []
    for axis in [axis for axis in wish.fixed if axis in (*AXES, "micro_tokens", "resident")]:
        if fits := [o for o in options(profile, budget, rates, _without(wish, axis)) if not o.reason]:
            best = ranked(fits)[0]
            hints.append(f"{NAMES[axis]}: {getattr(best.setting, axis)}")
    sequence = wish.sequence // 2
    while not hints and sequence >= 64:
        shorter = replace(wish, sequence=sequence, tokens=min(wish.tokens, max(sequence, wish.tokens // 2)))
        shorter = _without(shorter, "micro_tokens")
        if any(not o.reason for o in options(profile, budget, rates, shorter)):
            hints.append(f"data.max_length: {sequence} (--seq {sequence})")
        sequence //= 2
    return line + (
        "; it fits with " + " or ".join(hints) if hints else "; a smaller model or a smaller adapter.rank would"
    )


def _without(wish: Wish, axis: str) -> Wish:
    """The same with one axis left open."""
    return replace(wish, fixed={key: value for key, value in wish.fixed.items() if key != axis})


NAMES = {
    "quant": "quant",
    "stream": "train.stream",
    "dial": "train.checkpointing",
    "optimizer": "train.optimizer",
    "embedding": "train.embedding",
    "micro_tokens": "train.micro_batch_tokens",
    "keep": "train.keep_blocks",
    "resident": "train.resident_blocks",
}
"""Where the configuration has what a plan chooses."""


def describe(setting: size.Setting) -> str:
    """A setting in words, as the configuration names them."""
    parts = [
        f"quant {setting.quant}",
        f"rows of {setting.micro_tokens:,} tokens",
        f"checkpointing {setting.dial}",
        f"keep_blocks {setting.keep}" if setting.keep else "",
        f"{setting.optimizer}" if setting.optimizer != "adamw" else "",
        f"stream {setting.stream}" if setting.stream != "off" else "",
        f"resident_blocks {setting.resident}" if setting.resident else "",
        f"embedding {setting.embedding}" if setting.embedding != "device" else "",
    ]
    return ", ".join(part for part in parts if part)


def text(count: float) -> str:
    """Bytes in GB, as budgets are stated, or in MB below one of them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

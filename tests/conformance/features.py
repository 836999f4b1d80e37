"""The columns of the conformance table: each feature is one small entry, with PEFT's options and how it is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conformance import compare
from conformance.compare import Differs, Errors, NotInPeft, PeftIsWrong, Refused
from conformance.models import INVOCATION, Architecture
from torch import nn

import veneer
from veneer.errors import VeneerError


@dataclass(frozen=True)
class Feature:
    """One column. `options(architecture, names)` are LoraConfig's keywords, `names` PEFT's default target modules."""

    name: str
    options: Callable[[Architecture, list[str]], dict]
    check: Callable[[Architecture, dict, Path], float]


@dataclass(frozen=True)
class Cell:
    """One measured cell: status is "passed", "not in PEFT", "refused", "PEFT is wrong" or "DIFFERS"."""

    status: str
    error: float | None = None
    reason: str = ""


def run(architecture: Architecture, feature: Feature, folder: Path) -> Cell:
    """Measure one cell."""
    try:
        options = feature.options(architecture, default_targets(architecture))
        return Cell("passed", feature.check(architecture, options, folder))
    except NotInPeft as reason:
        return Cell("not in PEFT", reason=str(reason))
    except Refused as reason:
        return Cell("refused", reason=str(reason))
    except PeftIsWrong as reason:
        return Cell("PEFT is wrong", reason=str(reason))
    except Differs as reason:
        return Cell("DIFFERS", reason=str(reason))
    except Exception as error:  # noqa: BLE001  a crash in one cell must not hide the others
        return Cell("DIFFERS", reason=f"{type(error).__name__}: {compare.first_line(error)}")


_targets: dict[str, list[str]] = {}


def default_targets(architecture: Architecture) -> list[str]:
    """The modules that PEFT adapts when no target is named."""
    if architecture.name not in _targets:
        _targets[architecture.name] = list(compare.make_peft(architecture, {}).base_model.targeted_module_names)
    return _targets[architecture.name]


def round_trip(architecture: Architecture, options: dict, folder: Path) -> float:
    """PEFT → file → Veneer → file → PEFT: scores, loss, every gradient, both files, and the scores again."""
    theirs = compare.make_peft(architecture, options)
    compare.randomise(theirs)
    return compare_trained(architecture, theirs, folder)


def compare_trained(architecture: Architecture, theirs: nn.Module, folder: Path) -> float:
    batch, base, errors = architecture.batch(), architecture.model(), Errors()
    with compare.quiet():
        theirs.save_pretrained(folder / "peft")
    try:
        scores, loss = compare.answer(theirs, batch, backward=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise PeftIsWrong(f"it crashes: {compare.first_line(error)}") from None
    plain, _ = compare.answer(base, batch)
    if compare.relative(scores, plain) < 1e-3 and scores.shape == plain.shape:
        raise PeftIsWrong("the adapter changes nothing")
    mine = compare.load_in_veneer(architecture, folder / "peft")
    my_scores, my_loss = compare.answer(mine, batch, backward=True)
    try:
        errors.add("scores", my_scores, scores)
    except Differs:
        settle(theirs, batch, scores, my_scores)
    errors.add("loss", my_loss, loss)
    slopes = compare.veneer_gradients(mine, folder, base), compare.peft_gradients(theirs, folder, base)
    errors.add_all("gradient", *slopes)
    veneer.save_adapter(mine, folder / "veneer")
    compare.compare_files(folder / "veneer", folder / "peft", base)
    again = compare.load_in_peft(architecture, folder / "veneer")
    errors.add("scores back in PEFT", compare.answer(again, batch)[0], scores)
    return errors.largest


def settle(theirs: nn.Module, batch: dict, scores, my_scores) -> None:
    """Where the two differ, PEFT's merged weights decide: an adapter must answer as what it merges to."""
    with compare.quiet():
        merged, _ = compare.answer(copy.deepcopy(theirs).merge_and_unload(), batch)
    if compare.relative(my_scores, merged) <= compare.TOLERANCE:
        raise PeftIsWrong(
            f"live it differs from its own merged weights by {compare.relative(scores, merged):.0e}; "
            "Veneer's live answer is the merged one's"
        )
    raise Differs(f"scores differ by {compare.relative(my_scores, scores):.1e}")


def started(architecture: Architecture, options: dict, folder: Path) -> float:
    """`round_trip`, and Veneer's own start under this name leaves the model's answers as they were."""
    batch, errors = architecture.batch(), Errors()
    try:
        model = architecture.model()
        config = veneer.AdapterConfig(
            rank=4, alpha=6, init=options["init_lora_weights"], target_modules=default_targets(architecture)
        )
        veneer.attach(model, config, seed=1)
    except VeneerError as error:
        raise Refused(compare.first_line(error)) from None
    errors.add("scores at the start", compare.answer(model, batch)[0], compare.answer(architecture.model(), batch)[0])
    return max(errors.largest, round_trip(architecture, options, folder))


def residual(architecture: Architecture, options: dict, folder: Path) -> float:
    """A start that moves the base: PEFT's converted file (rank 2r) in Veneer, then Veneer's own start back in PEFT."""
    batch, base, errors = architecture.batch(), architecture.model(), Errors()
    theirs = compare.make_peft(architecture, options)
    with compare.quiet():
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(folder / "start")
        theirs.peft_config["default"].init_lora_weights = options["init_lora_weights"]
        nudge(theirs)
        theirs.save_pretrained(folder / "peft", path_initial_model_for_weight_conversion=str(folder / "start"))
    scores, _ = compare.answer(theirs, batch)
    mine = compare.load_in_veneer(architecture, folder / "peft")
    errors.add("scores", compare.answer(mine, batch)[0], scores, tolerance=1e-4)
    try:
        mine = architecture.model()
        config = veneer.AdapterConfig(
            rank=4, alpha=6, init=options["init_lora_weights"], target_modules=default_targets(architecture)
        )
        bank = veneer.attach(mine, config, seed=1)
    except VeneerError as error:
        raise Refused(compare.first_line(error)) from None
    errors.add("scores at the start", compare.answer(mine, batch)[0], compare.answer(base, batch)[0], tolerance=1e-4)
    fresh = compare.make_peft(architecture, options)
    for name, layer in bank.layers.items():
        key = f"base_model.model.{name}"
        product = fresh.get_submodule(key).get_delta_weight("default")
        own = bank.layers[name].scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
        errors.add(f"s·B·A of {name} at the start", own if own.shape == product.shape else own.t(), product, 1e-4)
    nudge_parameters(bank.parameters("default").values())
    scores, _ = compare.answer(mine, batch)
    veneer.save_adapter(mine, folder / "veneer")
    again = compare.load_in_peft(architecture, folder / "veneer")
    errors.add("scores back in PEFT", compare.answer(again, batch)[0], scores, tolerance=1e-4)
    return errors.largest


def nudge(model: nn.Module) -> None:
    nudge_parameters(p for p in model.parameters() if p.requires_grad)


def nudge_parameters(parameters) -> None:
    """A few training steps' worth of change."""
    import torch

    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def merging(architecture: Architecture, options: dict, folder: Path) -> float:
    """Merged by PEFT and by Veneer: the same scores as each other and as the unmerged adapter."""
    batch, errors = architecture.batch(), Errors()
    theirs = compare.make_peft(architecture, options)
    compare.randomise(theirs)
    with compare.quiet():
        theirs.save_pretrained(folder / "peft")
    unmerged, _ = compare.answer(theirs, batch)
    mine = compare.load_in_veneer(architecture, folder / "peft")
    bank = veneer.get_bank(mine)
    if not hasattr(bank, "merge"):
        raise Refused("merging is not there yet")
    before = {key: value.clone() for key, value in architecture.model().state_dict().items()}
    bank.merge()
    errors.add("merged scores", compare.answer(mine, batch)[0], unmerged)
    bank.unmerge()
    veneer.detach(mine)
    for key, value in mine.state_dict().items():
        if not (value == before[key]).all():
            raise Differs(f"{key} is not the base's own again after unmerge")
    with compare.quiet():
        merged = theirs.merge_and_unload()
    try:
        errors.add("scores merged by PEFT", compare.answer(merged, batch)[0], unmerged)
    except Differs as difference:
        raise PeftIsWrong(f"merged by PEFT, {difference}") from None
    return errors.largest


def several(architecture: Architecture, options: dict, folder: Path) -> float:
    """Two adapters of different ranks and targets: each alone, both at once, none, and each row its own."""
    batch, errors = architecture.batch(), Errors()
    names = default_targets(architecture)
    first, second = options | {"target_modules": names}, options | {"target_modules": names[::2], "r": 6}
    with compare.quiet():
        theirs = compare.make_peft(architecture, first, "one")
        from peft import LoraConfig

        theirs.add_adapter("two", LoraConfig(**{"lora_alpha": 6, "task_type": architecture.task} | second))
        for seed, name in enumerate(("one", "two")):
            theirs.set_adapter(name)
            compare.randomise(theirs, seed)
        theirs.save_pretrained(folder)
    mine = compare.load_in_veneer(architecture, folder / "one", name="one")
    try:
        bank = veneer.load_adapter(mine, folder / "two", name="two")
    except VeneerError as error:
        raise Refused(compare.first_line(error)) from None
    for active in (["one"], ["two"], ["one", "two"]):
        theirs.base_model.set_adapter(active)
        bank.activate(dict.fromkeys(active, 1.0))
        if len(active) == 1:
            bank.activate(active[0])
        errors.add(f"scores of {active}", compare.answer(mine, batch)[0], compare.answer(theirs, batch)[0])
    base, _ = compare.answer(architecture.model(), batch)
    with theirs.disable_adapter(), bank.disabled():
        errors.add("scores of the base", compare.answer(mine, batch)[0], compare.answer(theirs, batch)[0])
        errors.add("scores of the base", compare.answer(mine, batch)[0], base, tolerance=0.0)
    rows = ["two", None, "one"]
    with bank.route(rows):
        routed, _ = compare.answer(mine, batch)
    errors.add("scores of routed rows", routed, rows_by_peft(theirs, batch, rows))
    return errors.largest


def rows_by_peft(theirs: nn.Module, batch: dict, rows: list[str | None]):
    """Each row's scores from a pass with its own adapter: the definition of PEFT's `adapter_names` batches."""
    import torch

    found = []
    for row, name in enumerate(rows):
        if name is None:
            with theirs.disable_adapter():
                found.append(compare.answer(theirs, batch)[0][row])
        else:
            theirs.base_model.set_adapter([name])
            found.append(compare.answer(theirs, batch)[0][row])
    return torch.stack(found)


def _leaves(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def patterns(architecture: Architecture, names: list[str]) -> dict:
    """rsLoRA with α ≠ r; one module by a regular expression, one by its path, and one kind of module by its ending.

    No module matches two keys of a pattern: PEFT sorts the keys when it saves, so that another would win after loading.
    """
    leaf = _leaves(names)[0]
    same = [name for name in names if f".{name}".endswith("." + leaf)]
    first, last = same[0], same[-1]
    others = _leaves(names)[1:]
    return {
        "use_rslora": True,
        "rank_pattern": {first.replace(".0.", r"\.[0]\."): 6} | dict.fromkeys(others, 2),
        "alpha_pattern": {last: 7} | dict.fromkeys(others, 5),
        "r": 4,
        "lora_alpha": 9,
    }


def keep(architecture: Architecture, names: list[str]) -> dict:
    if architecture.keep is None:
        raise NotInPeft("no head to train")
    return {"modules_to_save": [architecture.keep]}


def embeddings(architecture: Architecture, names: list[str]) -> dict:
    if architecture.embedding is None:
        raise NotInPeft("the model has no token embedding")
    return {"target_modules": [*_leaves(names), architecture.embedding]}


def tokens(architecture: Architecture, names: list[str]) -> dict:
    if architecture.embedding is None:
        raise NotInPeft("the model has no token embedding")
    return {"trainable_token_indices": {architecture.embedding: [9, 5, 66]}}


def experts(architecture: Architecture, names: list[str]) -> dict:
    if not architecture.experts:
        raise NotInPeft("the model has no fused expert parameters")
    return {"target_parameters": list(architecture.experts)}


def invocation(architecture: Architecture, names: list[str]) -> dict:
    if architecture.task != "CAUSAL_LM":
        raise NotInPeft("activated LoRA is for causal language models")
    return {"alora_invocation_tokens": list(INVOCATION)}


def _fixed(**options) -> Callable[[Architecture, list[str]], dict]:
    return lambda architecture, names: dict(options)


FEATURES = [
    Feature("LoRA", _fixed(), round_trip),
    Feature("rsLoRA, patterns", patterns, round_trip),
    Feature("all-linear", _fixed(target_modules="all-linear"), round_trip),
    Feature("bias: lora_only", _fixed(bias="lora_only"), round_trip),
    Feature("bias: all", _fixed(bias="all"), round_trip),
    Feature("modules_to_save", keep, round_trip),
    Feature("DoRA", _fixed(use_dora=True), round_trip),
    Feature("lora_bias", _fixed(lora_bias=True), round_trip),
    Feature("embeddings", embeddings, round_trip),
    Feature("trainable tokens", tokens, round_trip),
    Feature("target_parameters", experts, round_trip),
    Feature("aLoRA", invocation, round_trip),
    Feature("init: gaussian", _fixed(init_lora_weights="gaussian"), started),
    Feature("init: orthogonal", _fixed(init_lora_weights="orthogonal"), started),
    Feature("init: pissa", _fixed(init_lora_weights="pissa"), residual),
    Feature("init: olora", _fixed(init_lora_weights="olora"), residual),
    Feature("several adapters", _fixed(), several),
    Feature("merge", _fixed(target_modules="all-linear"), merging),
]

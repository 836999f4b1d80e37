"""The columns of the conformance table: each feature is one small entry, with PEFT's options and how it is checked."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
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
    return max(compare_trained(architecture, theirs, folder), back_trip(architecture, options, folder))


def back_trip(architecture: Architecture, options: dict, folder: Path) -> float:
    """Attached by Veneer under the same options → file → PEFT: scores, loss, every gradient, and the config's fields."""
    batch, base, errors = architecture.batch(), architecture.model(), Errors()
    resolved = json.loads((folder / "peft" / "adapter_config.json").read_text())
    if resolved["target_parameters"]:  # PEFT's "all-linear" also takes fused experts; Veneer has them named
        options = options | {key: resolved[key] for key in ("target_parameters", "rank_pattern", "alpha_pattern")}
    try:
        mine = attach(architecture, options)
    except Refused as reason:
        raise Refused(f"{reason} (a new adapter; PEFT's file loads and passed)") from None
    compare.randomise_parameters(veneer.get_bank(mine).parameters("default"), seed=1)
    scores, loss = compare.answer(mine, batch, backward=True)
    veneer.save_adapter(mine, folder / "attached")
    compare.compare_configs(folder / "attached", folder / "peft", base)
    theirs = compare.load_in_peft(architecture, folder / "attached")
    their_scores, their_loss = compare.answer(theirs, batch, backward=True)
    errors.add("scores of Veneer's own adapter", scores, their_scores)
    errors.add("loss of Veneer's own adapter", loss, their_loss)
    slopes = [
        grads(model, folder / "own", base)
        for grads, model in ((compare.veneer_gradients, mine), (compare.peft_gradients, theirs))
    ]
    errors.add_all("gradient of Veneer's own adapter", *slopes)
    return errors.largest


NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "init",
    "trainable_token_indices": "trainable_tokens",
    "alora_invocation_tokens": "invocation",
    "layers_to_transform": "layers",
}
"""LoraConfig's keywords that AdapterConfig calls otherwise."""


def attach(architecture: Architecture, options: dict) -> nn.Module:
    """The base with a new adapter in Veneer, from LoraConfig's keywords; `Refused` where Veneer says no."""
    model = architecture.model()
    values = {"r": 4, "lora_alpha": 6, "target_modules": default_targets(architecture)} | options
    try:
        config = veneer.AdapterConfig(
            tied_head="embedding", **{NAMES.get(key, key): value for key, value in values.items()}
        )
        veneer.attach(model, config, seed=1)
    except VeneerError as error:
        raise Refused(compare.first_line(error)) from None
    return model


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
        settle(architecture, theirs, folder / "peft", mine)
    errors.add("loss", my_loss, loss)
    slopes = compare.veneer_gradients(mine, folder, base), compare.peft_gradients(theirs, folder, base)
    try:
        errors.add_all("gradient", *slopes)
    except Differs as difference:
        settle_gradient(architecture, theirs, difference)
    veneer.save_adapter(mine, folder / "veneer")
    compare.compare_files(folder / "veneer", folder / "peft", base)
    again = compare.load_in_peft(architecture, folder / "veneer")
    errors.add("scores back in PEFT", compare.answer(again, batch)[0], scores)
    return errors.largest


def settle(architecture: Architecture, theirs: nn.Module, path: Path, mine: nn.Module, name: str = "default") -> None:
    """Where the two differ, the definition decides: the base with W + s·B·A in each weight, made of PEFT's own ΔW."""
    from peft.tuners.lora import LoraLayer

    batch, truth = architecture.batch(), architecture.model()
    scores, my_scores = (compare.answer(model, batch)[0] for model in (theirs, mine))
    with torch.no_grad():
        for key, layer in theirs.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.r:
                module = truth.get_submodule(key.removeprefix("base_model.model.").replace("base_layer.", ""))
                weight = module.in_proj_weight if hasattr(module, "in_proj_weight") else module.weight
                weight.add_(layer.get_delta_weight(name))
        own = dict(truth.named_parameters())
        for key, value in compare.tensors_of(path, architecture.model()).items():
            if "lora_" not in key:
                own[key.removeprefix("base_model.model.").replace(".base_layer.", ".")].copy_(value)
    with compare.quiet():
        candidates = truth, copy.deepcopy(theirs).merge_and_unload(adapter_names=[name])
    for expected in (compare.answer(model, batch)[0] for model in candidates):
        if compare.relative(my_scores, expected) <= compare.TOLERANCE:
            error = compare.relative(scores, expected)
            raise PeftIsWrong(f"its answer is {error:.0e} off the one with W + ΔW as weights, which is Veneer's")
    raise Differs(f"scores differ by {compare.relative(my_scores, scores):.1e}")


def settle_gradient(architecture: Architecture, theirs: nn.Module, difference: Differs) -> None:
    """A gradient must be the derivative of the loss it comes from: a finite difference along each parameter's gradient."""
    batch = architecture.batch()
    compare.answer(theirs, batch, backward=True)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None or parameter.grad.norm() < 1e-4:
            continue
        slope = parameter.grad.norm().item()
        step, losses = parameter.grad / slope * 2e-2, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step)
            losses.append(compare.answer(theirs, batch)[1].item())
            with torch.no_grad():
                parameter.sub_(sign * step)
        measured = (losses[0] - losses[1]) / 4e-2
        if abs(measured - slope) > 0.2 * slope:
            raise PeftIsWrong(
                f"its gradient of {name.removeprefix('base_model.model.')} is {slope / measured:.2f} times the derivative "
                "of its own loss; scores and loss are the same as Veneer's"
            )
    raise difference


def started(architecture: Architecture, options: dict, folder: Path) -> float:
    """`round_trip`, and Veneer's own start under this name leaves the model's answers as they were."""
    batch, errors = architecture.batch(), Errors()
    started, plain = attach(architecture, options), architecture.model()
    errors.add("scores at the start", compare.answer(started, batch)[0], compare.answer(plain, batch)[0])
    return max(errors.largest, round_trip(architecture, options, folder))


def residual(architecture: Architecture, options: dict, folder: Path) -> float:
    """A start that moves the base: Veneer's own start into PEFT, then PEFT's converted file (rank 2r) into Veneer."""
    batch, base, errors, tolerance = architecture.batch(), architecture.model(), Errors(), 1e-4
    theirs = compare.make_peft(architecture, options)
    mine = attach(architecture, options)
    errors.add("scores at the start", compare.answer(mine, batch)[0], compare.answer(base, batch)[0], tolerance)
    bank = veneer.get_bank(mine)
    starts = {
        name: layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
        for name, layer in bank.layers.items()
    }
    products = {name: theirs.get_submodule(f"base_model.model.{name}").get_delta_weight("default") for name in starts}
    compare.nudge(bank.parameters("default").values())
    scores, _ = compare.answer(mine, batch)
    veneer.save_adapter(mine, folder / "veneer")
    again = compare.load_in_peft(architecture, folder / "veneer")
    errors.add("scores back in PEFT", compare.answer(again, batch)[0], scores, tolerance)
    scores = converted_by_peft(architecture, theirs, options, folder)
    for name, product in products.items():
        own = starts[name] if starts[name].shape == product.shape else starts[name].t()
        errors.add(f"s·B·A of {name} at the start", own, product, tolerance)
    mine = compare.load_in_veneer(architecture, folder / "peft")
    errors.add("scores", compare.answer(mine, batch)[0], scores, tolerance)
    return errors.largest


def converted_by_peft(architecture: Architecture, theirs: nn.Module, options: dict, folder: Path):
    """Scores of PEFT's live adapter, saved as a plain one of rank 2r; `PeftIsWrong` where that loses something."""
    from safetensors.torch import load_file

    try:
        with compare.quiet():
            theirs.peft_config["default"].init_lora_weights = True
            theirs.save_pretrained(folder / "start")
            theirs.peft_config["default"].init_lora_weights = options["init_lora_weights"]
            compare.nudge(p for p in theirs.parameters() if p.requires_grad)
            theirs.save_pretrained(folder / "peft", path_initial_model_for_weight_conversion=str(folder / "start"))
    except RuntimeError as error:
        raise PeftIsWrong(
            f"its conversion to a plain adapter crashes, {compare.first_line(error)} (Veneer's own start passed)"
        ) from None
    whole = {key for key in load_file(folder / "start" / "adapter_model.safetensors") if "lora_" not in key}
    lost = whole - load_file(folder / "peft" / "adapter_model.safetensors").keys()
    if lost:
        raise PeftIsWrong("its conversion to a plain adapter loses modules_to_save (Veneer's own start passed)")
    return compare.answer(theirs, architecture.batch())[0]


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
    before = {key: value.clone() for key, value in architecture.model().state_dict().items()}
    try:
        bank.merge()
    except VeneerError as error:
        raise Refused(compare.first_line(error)) from None
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
    options = options | {"modules_to_save": list(architecture.heads)}
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
    whole = bool(theirs.peft_config["one"].modules_to_save)  # two heads cannot act at once: both libraries refuse
    for active in (["one"], ["two"]) if whole else (["one"], ["two"], ["one", "two"]):
        theirs.base_model.set_adapter(active)
        bank.activate(dict.fromkeys(active, 1.0))
        if len(active) == 1:
            bank.activate(active[0])
        try:
            errors.add(f"scores of {active}", compare.answer(mine, batch)[0], compare.answer(theirs, batch)[0])
        except RuntimeError as error:
            raise PeftIsWrong(f"it crashes: {compare.first_line(error)}") from None
        except Differs:
            settle(architecture, theirs, folder / active[0], mine, active[0])
    base, _ = compare.answer(architecture.model(), batch)
    with theirs.disable_adapter(), bank.disabled():
        errors.add("scores of the base", compare.answer(mine, batch)[0], compare.answer(theirs, batch)[0])
        # torch's attention takes another of its code paths when its out_proj is not torch's own class
        fused = any(isinstance(module, nn.MultiheadAttention) for module in mine.modules())
        errors.add("scores of the base", compare.answer(mine, batch)[0], base, tolerance=1e-6 if fused else 0.0)
    if whole or fused:  # both libraries refuse to route these by row
        return errors.largest
    rows = ["two", None, "one"]
    with bank.route(rows):
        routed, _ = compare.answer(mine, batch)
    errors.add("scores of routed rows", routed, rows_by_peft(theirs, batch, rows))
    return errors.largest


def rows_by_peft(theirs: nn.Module, batch: dict, rows: list[str | None]):
    """Each row's scores from a pass with its own adapter: the definition of PEFT's `adapter_names` batches."""
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
        "alpha_pattern": {last: 5} | dict.fromkeys(others, 1),
        "r": 4,
        "lora_alpha": 3,
    }


def layers(architecture: Architecture, names: list[str]) -> dict:
    if not any(".1." in name for name in names):
        raise NotInPeft("the model has no second block")
    return {"layers_to_transform": [1], "target_modules": _leaves(names)}


def keep(architecture: Architecture, names: list[str]) -> dict:
    if architecture.keep is None:
        raise NotInPeft("no head to train")
    return {"modules_to_save": [architecture.keep]}


def embeddings(architecture: Architecture, names: list[str]) -> dict:
    if architecture.embedding is None:
        raise NotInPeft("the model has no token embedding")
    return {"target_modules": [*_leaves(names), architecture.lookups or architecture.embedding]}


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
    Feature("layers_to_transform", layers, round_trip),
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

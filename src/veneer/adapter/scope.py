"""What an adapter will change in a model: found and checked before anything changes."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.adapter.frozen import is_quantised
from veneer.adapter.layers import plain
from veneer.adapter.layers.embedding import adaptable
from veneer.adapter.targets import Target, input_embedding, near_misses, output_head, plain_name
from veneer.adapter.task import task_heads
from veneer.adapter.vocabulary import add_tokens, rows_to_train
from veneer.config import AdapterConfig
from veneer.errors import ConfigError, TargetError


def with_token_ids(model: nn.Module, config: AdapterConfig, tokenizer: Any) -> AdapterConfig:
    """The configuration with its texts as token ids: new_tokens (which the tokenizer and the model are given, and whose
    rows are trained) and invocation. Raises `ConfigError` without a tokenizer for them, or for ids that are no tokens."""
    if isinstance(config.invocation, list) and (embedding := input_embedding(model)) is not None:
        rows = plain(embedding).weight.shape[0]
        if wrong := [i for i in config.invocation if not 0 <= i < rows]:
            raise ConfigError(f"invocation: {wrong[0]} is no token of the model, whose vocabulary is 0 to {rows - 1}")
    texts = [*config.new_tokens, *([config.invocation] if isinstance(config.invocation, str) else [])]
    if not texts:
        return config
    if tokenizer is None:
        raise ConfigError(f"{texts[0]!r} is a text (new_tokens or invocation): pass tokenizer=…")
    changes = {}
    if config.new_tokens:
        ids = add_tokens(model, tokenizer, config.new_tokens)
        changes["trainable_tokens"] = rows_to_train(model, ids, config.trainable_tokens)
    if isinstance(config.invocation, str):
        changes["invocation"] = tokenizer.encode(config.invocation, add_special_tokens=False)
    return config.model_copy(update=changes)


def with_task_heads(model: nn.Module, config: AdapterConfig, targets: list[Target]) -> AdapterConfig:
    """The configuration with a classifier's new head among modules_to_save, unless it is adapted or named there."""
    heads = [
        head
        for head in task_heads(model)
        if head not in config.modules_to_save
        and not any(t.name == head or t.name.startswith(f"{head}.") for t in targets)
    ]
    return config.model_copy(update={"modules_to_save": [*config.modules_to_save, *heads]}) if heads else config


class Plan:
    """What an adapter will change in a model, found and checked before anything changes.

    Raises `TargetError` as `attach` does; a `saved` adapter may ask for biases where there are none, as PEFT's do.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, targets: list[Target], *, saved: bool = False) -> None:
        self.model, self.config, self.targets = model, config, targets
        self.tied = self._tied_embedding()
        self.tokens = trained_tokens(model, config, targets)
        self.modules = _modules_to_save(model, config, targets)
        self.biases = _biases(model, config, [target.name for target in targets], set(self.modules))
        if config.bias != "none" and not (self.biases or saved):
            where = "the model has" if config.bias == "all" else "the adapted modules have"
            raise TargetError(f"bias: {config.bias} has nothing to train, as {where} no bias; use bias: none")

    def _tied_embedding(self) -> str | None:
        """The adapted embedding whose weight the output head shares, if the head is to see the adapter."""
        head = output_head(self.model)
        for target in self.targets:
            if target.kind == "embedding" and head is not None and plain(head).weight is target.module.weight:
                if self.config.tied_head == "refuse":
                    raise TargetError(
                        f"{target.name} shares its weight with the output head (tied): choose tied_head: both (the head "
                        f"sees the adapter too) or tied_head: embedding (it does not, as in PEFT)"
                    )
                if self.config.tied_head == "both":
                    if self.config.dora:
                        raise TargetError("tied_head: both is not defined with dora: use tied_head: embedding")
                    return target.name
        return None


def trained_tokens(
    model: nn.Module, config: AdapterConfig, targets: list[Target]
) -> dict[str, tuple[nn.Module, list[int]]]:
    """Name of an embedding or output head → (module, token ids) of config.trainable_tokens. Raises `TargetError`."""
    wanted = config.trainable_tokens
    if not wanted:
        return {}
    head = output_head(model)
    modules = {plain_name(path): plain(m) for path, m in model.named_modules() if ".lora_" not in path}
    modules = {path: m for path, m in modules.items() if isinstance(m, nn.Embedding) or head and m is plain(head)}
    if not isinstance(wanted, dict):
        embedding = input_embedding(model)
        embedding = embedding if embedding is None else plain(embedding)
        names = [path for path, m in modules.items() if m is embedding]
        if not names:
            raise TargetError("the model does not say which its input embedding is: name it, {module: [ids]}")
        wanted = {names[0]: wanted}
    found = {}
    for entry, indices in wanted.items():
        paths = [p for p in modules if p == entry or p.endswith("." + entry)]
        if not paths:
            raise TargetError(
                f"trainable_tokens {entry!r} is no embedding or output head; {near_misses(entry, modules)}"
            )
        for path in paths:
            module, rows = modules[path], modules[path].weight.shape[0]
            reason = adaptable(module) if isinstance(module, nn.Embedding) else None
            beyond = [i for i in indices if not 0 <= i < rows]
            if beyond:
                reason = f"token id {beyond[0]} is beyond its {rows} rows (new_tokens makes it larger)"
            if any(target.name == path for target in targets):
                reason = "it is in target_modules too: choose one of the two"
            if len(set(indices)) != len(indices):
                reason = "a token id is given twice"
            if reason:
                raise TargetError(f"trainable_tokens: {path}: {reason}")
            found[path] = (module, list(indices))
    return found


def _modules_to_save(model: nn.Module, config: AdapterConfig, targets: list[Target]) -> dict[str, nn.Module]:
    modules = {plain_name(path): plain(m) for path, m in model.named_modules() if path and ".lora_" not in path}
    kept = {}
    for entry in config.modules_to_save:
        found = {p: m for p, m in modules.items() if p == entry or p.endswith("." + entry)}
        if not found:
            raise TargetError(f"modules_to_save {entry!r} matches nothing; {near_misses(entry, modules)}")
        kept |= found
    for path, module in kept.items():
        packed = next((type(part).__name__ for part in module.modules() if is_quantised(part)), None)
        if packed:
            raise TargetError(
                f"modules_to_save {path}: a quantised module ({packed}) cannot be trained in full: adapt it"
            )
        inside = next((t.name for t in targets if t.name == path or t.name.startswith(path + ".")), None)
        if inside:
            raise TargetError(f"{inside} is in modules_to_save and in target_modules: exclude it from one")
        weights = {id(p) for p in module.parameters()}
        for other, rest in modules.items():
            related = other == path or other.startswith(path + ".") or path.startswith(other + ".")
            if not related and other not in kept and any(id(p) in weights for p in rest.parameters(recurse=False)):
                if module is getattr(model, "get_output_embeddings", lambda: None)():
                    continue  # an own copy of a tied head is well defined: the embedding stays the base's
                raise TargetError(
                    f"{path} shares its weight with {other} (tied): training it alone would leave {other} behind; "
                    f"list both in modules_to_save (they are then trained apart) or neither"
                )
    return kept


def _biases(model: nn.Module, config: AdapterConfig, targets: list[str], kept: set[str]) -> dict[str, nn.Parameter]:
    """Copies of the biases that config.bias names; those of modules that are `kept` whole come with the module."""
    chosen = {}
    if config.bias == "none":
        return chosen
    for path, parameter in model.named_parameters():
        path = plain_name(path)
        parent, _, leaf = path.rpartition(".")
        if any(f"{parent}.".startswith(f"{module}.") for module in kept):
            continue
        if leaf == "bias" and parent in targets or config.bias == "all" and "bias" in leaf and "lora_" not in path:
            chosen[path] = nn.Parameter(parameter.detach().clone())
    return chosen

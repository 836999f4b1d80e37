"""New tokens: a larger vocabulary of which only the new rows are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from veneer.adapter.layers import AdaptedModule, plain
from veneer.adapter.targets import output_head, plain_name
from veneer.errors import AdapterStateError


def add_tokens(model: nn.Module, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Give a tokenizer and its model these tokens, and return their ids; those that they have already stay.

    The model's embedding and output head grow where their rows do not reach; a new row starts as the mean of the old
    ones, so the same call always gives the same model. Raises `AdapterStateError` if they would have to grow under an
    adapter.
    """
    tokenizer.add_tokens(list(tokens))
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids) < rows:
        return ids
    if any(isinstance(module, AdaptedModule) for module in model.modules()):
        raise AdapterStateError("new tokens make the base's vocabulary larger: attach the adapter that has them first")
    model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for matrix in {id(m.weight): m for m in _matrices(model)}.values():
            matrix.weight[rows:] = matrix.weight[:rows].float().mean(0).to(matrix.weight.dtype)
            if getattr(matrix, "bias", None) is not None:
                matrix.bias[rows:] = 0
    return ids


def _matrices(model: nn.Module) -> list[nn.Module]:
    found = [model.get_input_embeddings(), output_head(model)]
    return [plain(module) for module in found if module is not None]


def rows_to_train(
    model: nn.Module, ids: Sequence[int], more: Sequence[int] | Mapping[str, Sequence[int]] | None = None
) -> dict[str, list[int]]:
    """Which rows of which matrices are trained for new tokens, by module name; `more` is config.trainable_tokens.

    The input embedding's, and the output head's if it has a weight of its own: else the model could not say them.
    """
    names = {id(plain(module)): plain_name(name) for name, module in model.named_modules()}
    embedding, *head = _matrices(model)
    chosen = [embedding, *(h for h in head if h.weight is not embedding.weight)]
    more = more if isinstance(more, Mapping) else {names[id(embedding)]: more or []}
    wanted = {name: list(rows) for name, rows in more.items()}
    for module in chosen:
        name = next((n for n in wanted if names[id(module)].endswith(n)), names[id(module)])
        wanted[name] = list(dict.fromkeys([*wanted.get(name, []), *ids]))
    return wanted

"""Weights from a base's checkpoint, whatever loading made of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_llama
from veneer.base.load import BaseInfo
from veneer.base.original import float_weights
from veneer.errors import BaseModelError

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(params=["5GB", "30KB"], ids=["one file", "shards"])
def saved(request, tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path, max_shard_size=request.param)
    return tmp_path


def test_weights_are_the_checkpoints(saved):
    model = tiny_llama(seed=1)
    model.veneer_base = BaseInfo("x", str(saved))
    assert torch.equal(float_weights(model)(NAME), tiny_llama().get_submodule(NAME).weight.bfloat16())


def test_a_checkpoint_of_the_body_alone(tmp_path):
    model = tiny_llama()
    model.model.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    assert torch.equal(float_weights(model)(NAME), model.get_submodule(NAME).weight)


def test_what_is_not_there_is_an_error(tmp_path):
    model = tiny_llama()
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(BaseModelError, match="no safetensors checkpoint"):
        float_weights(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="no tensor model.nothing.weight"):
        float_weights(model)("model.nothing")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {f"{NAME}.weight": torch.ones(3, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(BaseModelError, match="stored as torch.uint8"):
        float_weights(model)(NAME)

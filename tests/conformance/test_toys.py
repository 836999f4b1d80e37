"""The table's checks on every kind of layer outside transformers: Conv1d/2d/3d, Embedding, attention, Conv1D."""

from __future__ import annotations

import re

import pytest
from conformance.features import FEATURES, run
from conformance.toys import TOYS

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("no_model_cards")

COLUMNS = [
    f
    for f in FEATURES
    if f.name not in ("embeddings", "trainable tokens", "target_parameters", "aLoRA", "layers_to_transform")
]
REASONS = [
    "has nothing to train",  # bias without a bias
    "no head to train",
    "Please specify|No modules were targeted",  # PEFT's all-linear on a model without a linear
    "crashes: The size of tensor",  # PEFT's convolution without the base's dilation
    "is .* off the one with W . ΔW as weights",  # PEFT's convolution without the base's padding mode
    "times the derivative of its own loss",  # PEFT adds the update of attention's out_proj twice, its gradient once
    "in_proj_bias",  # PEFT's bias "all" leaves out attention's own
    "Unknown initialization|has no attribute 'weight'|not supported for Embedding|does not support DoRA",  # PEFT's words
    "is for linear layers",  # Veneer: orthogonal, PiSSA and OLoRA
    "not defined for",  # Veneer: lora_bias on attention, DoRA on a grouped convolution
    "mha.out_proj",  # PEFT's all-linear adapts the projection that torch never calls
    "conversion to a plain adapter crashes",
    "adapter on a grouped convolution",
]
"""Why a cell may be something else than passed."""


@pytest.mark.parametrize("toy", TOYS, ids=lambda t: t.name.replace(", ", " "))
@pytest.mark.parametrize("feature", COLUMNS, ids=lambda f: f.name.replace(", ", " "))
def test_cell(toy, feature, tmp_path):
    cell = run(toy, feature, tmp_path)
    expected = cell.status == "passed" or re.search("|".join(REASONS), cell.reason)
    assert expected and cell.status != "DIFFERS", f"{cell.status}: {cell.reason}"

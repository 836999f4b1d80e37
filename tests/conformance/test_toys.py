"""The table's checks on every kind of layer outside transformers: Conv1d/2d/3d, Embedding, attention, Conv1D."""

from __future__ import annotations

import pytest
from conformance.features import FEATURES, run
from conformance.toys import TOYS

pytest.importorskip("peft")

COLUMNS = [
    f
    for f in FEATURES
    if f.name not in ("all-linear", "embeddings", "trainable tokens", "target_parameters", "aLoRA", "init: olora")
]


@pytest.mark.parametrize("toy", TOYS, ids=lambda t: t.name.replace(", ", " "))
@pytest.mark.parametrize("feature", COLUMNS, ids=lambda f: f.name.replace(", ", " "))
def test_cell(toy, feature, tmp_path):
    cell = run(toy, feature, tmp_path)
    assert cell.status != "DIFFERS", cell.reason

"""Cells of the conformance table: PEFT and Veneer give the same answers, gradients and files, both ways.

`scripts/conformance_table.py` measures all of them; here are all features of Llama, plain LoRA and a third of the rest,
so that every architecture and every feature is there.
"""

from __future__ import annotations

import re

import pytest
from conformance.features import FEATURES, run
from conformance.models import ARCHITECTURES

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("no_model_cards")

CELLS = [
    (architecture, feature)
    for row, architecture in enumerate(ARCHITECTURES)
    for column, feature in enumerate(FEATURES)
    if row == 0 or column == 0 or (row + column) % 3 == 0
]
REASONS = [
    "has nothing to train",  # bias without a bias
    "no token embedding",
    "no fused expert parameters",
    "no head to train",
    "for causal language models",
    "loses modules_to_save",
    "conversion to a plain adapter crashes",
    "modules_to_save cannot be applied",  # PEFT's all-linear takes a classifier that it also keeps whole
]
"""Why a cell may be something else than passed."""


@pytest.mark.parametrize("architecture, feature", CELLS, ids=[f"{f.name} {a.name}".replace(",", "") for a, f in CELLS])
def test_cell(architecture, feature, tmp_path):
    cell = run(architecture, feature, tmp_path)
    expected = cell.status == "passed" or re.search("|".join(REASONS), cell.reason)
    assert expected and cell.status != "DIFFERS", f"{cell.status}: {cell.reason}"

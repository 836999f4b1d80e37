"""Every cell of the conformance table: PEFT and Veneer give the same answers, gradients and files, both ways."""

from __future__ import annotations

import pytest
from conformance.features import FEATURES, run
from conformance.models import ARCHITECTURES

pytest.importorskip("peft")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name.replace(", ", " "))
@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.name.replace(", ", " "))
def test_cell(architecture, feature, tmp_path):
    cell = run(architecture, feature, tmp_path)
    assert cell.status != "DIFFERS", cell.reason

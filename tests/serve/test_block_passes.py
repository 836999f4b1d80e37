"""Passes over a model through the kernels of whole blocks themselves, in triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_whole_passes_interpreted_read_nothing_that_is_not_written(monkeypatch):
    """With NaN in all memory that is taken uninitialised, and an adapter of few linears."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    subprocess.run(
        [sys.executable, str(__file__).replace("test_block_passes", "passes"), "qv"], check=True, timeout=120
    )

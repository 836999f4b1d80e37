"""The losses and slopes of logits in triton, interpreted, against their twin."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

INTERPRETED = """
import contextlib, torch
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
from veneer.kernels import cross_entropy_triton
from veneer.kernels.cross_entropy import loss_and_slope

cross_entropy_triton.BLOCK = 64
torch.manual_seed(0)
for rows, width in ((5, 201), (1, 64), (3, 7)):
    targets = torch.randint(0, width, (2 * rows,))[::2]  # of any stride
    targets[-1], targets[0] = -100, width - 1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for softcap, scale in ((None, 1.0), (None, 0.25), (3.0, 1.0), (2.0, 1.5)):
            z = (4 * torch.randn(rows, width + 3)).to(dtype)[:, :width]
            z[0, :2] = -torch.inf if softcap is None else 40.0
            wanted = loss_and_slope(z, targets, softcap, scale)
            found = cross_entropy_triton.loss_and_slope(z, targets, softcap, scale)
            assert found[1] is z and found[0].dtype == torch.float32
            for a, b, eps in zip(found, wanted, (1e-6, torch.finfo(dtype).eps)):
                assert b.isfinite().all()
                torch.testing.assert_close(a, b, rtol=eps + 2e-6, atol=2e-6)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_does_what_its_twin_does(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, timeout=600)

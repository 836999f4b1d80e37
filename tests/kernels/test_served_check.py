"""Kernels that do not compute what their definitions do are found before a server uses them."""

import pytest
import torch

from veneer.kernels import served_check
from veneer.kernels.served_check import deviation, sound

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_are_sound(dtype):
    assert sound(CPU, dtype)


@pytest.mark.parametrize("fault", [lambda h: h + 0.1, lambda h: h * float("nan"), lambda h: h[:, :, :1]])
def test_wrong_and_failing_kernels_are_not(fault, monkeypatch):
    right = served_check.shrink
    monkeypatch.setattr(served_check, "shrink", lambda x, A, tiles: fault(right(x, A, tiles)))
    assert not sound(CPU, torch.float32) and deviation(CPU, torch.float32) != 0

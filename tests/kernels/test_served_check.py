"""Kernels that do not compute what their definitions do are found before a server uses them."""

import pytest
import torch

from veneer.kernels import served_block_check, served_check
from veneer.kernels.served_check import Shapes, deviation, sound, sound_blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_are_sound(dtype):
    assert sound(CPU, dtype)


@pytest.mark.parametrize("fault", [lambda h: h + 0.1, lambda h: h * float("nan"), lambda h: h[:, :, :1]])
def test_wrong_and_failing_kernels_are_not(fault, monkeypatch):
    right = served_check.shrink
    monkeypatch.setattr(served_check, "shrink", lambda x, A, tiles: fault(right(x, A, tiles)))
    assert not sound(CPU, torch.float32) and deviation(CPU, torch.float32) != 0


def only_large_tiles(right):
    """Wrong in the last rows of tiles of 32."""
    return lambda x, A, tiles: right(x, A, torch.where(torch.arange(tiles.shape[2]) > 30, -1, tiles))


def only_windows(right):
    return lambda *inputs: right(*inputs[:-1], None)


@pytest.mark.parametrize(
    "kernel, fault", [("shrink", only_large_tiles), ("attend", only_windows), ("attend_pieces", only_windows)]
)
def test_each_kernel_is_tried_in_all_its_uses(kernel, fault, monkeypatch):
    monkeypatch.setattr(served_check, kernel, fault(getattr(served_check, kernel)))
    assert not sound(CPU, torch.float32)


def test_a_model_of_other_shapes_and_another_dtype_of_its_cache():
    shapes = Shapes(linears=((64, (96, 16, 7)), (33, (5,))), heads=(1, 5, 80), windows=(None, 1, 300))
    assert sound(CPU, torch.float32, shapes, torch.bfloat16) and sound(CPU, torch.bfloat16, shapes, torch.float16)


BLOCK = Shapes(heads=(2, 3, 12), block=(84, 136, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_of_blocks_are_sound(dtype):
    assert sound_blocks(CPU, dtype, BLOCK)


@pytest.mark.parametrize("kernel", ["norm", "add", "rotate", "attend_parts", "gather", "gated"])
@pytest.mark.parametrize("fault", [lambda t: 1.1 * t, lambda t: t * float("nan"), lambda t: t[:, :1]])
def test_each_kernel_of_a_block_is_tried(kernel, fault, monkeypatch):
    right = getattr(served_block_check.KERNELS, kernel)

    def wrong(*inputs):
        made = right(*inputs)
        if isinstance(made, tuple):
            return type(made)(fault(made[0]), *made[1:]) if hasattr(made, "_fields") else (fault(made[0]), *made[1:])
        return made if made is None else fault(made)

    monkeypatch.setattr(served_block_check.KERNELS, kernel, wrong)
    assert not sound_blocks(CPU, torch.float32, BLOCK)

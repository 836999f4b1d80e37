"""Served blocks on a GPU: kernels against their twins at models' widths, and captured passes of known blocks."""

from __future__ import annotations

import pytest
import torch
from serve.block_checks import check_base_rows, check_block, check_range

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
WIDE = {"rows": 64, "D": 4096, "I": 14336, "heads": (8, 4, 128), "C": 1024}


@pytest.mark.parametrize("size", [1, 16, 32])
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.bfloat16, WIDE),
        (torch.float16, {}),
        (torch.float32, {"D": 300, "I": 530, "rank": 64, "heads": (1, 2, 80)}),
    ],
)
def test_the_kernels_of_a_served_block_are_their_twins(dtype, options, size):
    check_block(1e-4 if dtype == torch.float32 else 2e-2, dtype, "cuda", size, **options)


@pytest.mark.parametrize("size", [1, 16, 32])
@pytest.mark.parametrize("options", [{}, WIDE])
def test_rows_without_an_adapter_are_bit_equal_to_the_base(size, options):
    check_base_rows(torch.bfloat16, "cuda", size, **options)


@pytest.mark.parametrize("size", [1, 16, 32])
def test_float16_has_room_for_what_is_not_normed_yet(size):
    check_range("cuda", size)

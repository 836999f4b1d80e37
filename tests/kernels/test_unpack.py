"""4-bit weights unpacked into a group's matrix, and many small copies: the twins, and the triton kernels interpreted."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from veneer.kernels.scaled_copies import ScaledCopies
from veneer.kernels.unpack import SHARED, unpack


def source(nested: bool, kind: str = "nf4"):
    """Two weights, (33, 128) and (20, 128), rank 5: a source and the weights as bitsandbytes has them."""
    from bitsandbytes import functional

    torch.manual_seed(0)
    quantised = [
        functional.quantize_4bit(torch.randn(rows, 128), compress_statistics=nested, quant_type=kind)
        for rows in (33, 20)
    ]
    states, empty = [state for _, state in quantised], torch.empty(0)
    parts = [
        *[packed.view(-1) for packed, _ in quantised],
        *[state.absmax for state in states],
        *[state.state2.absmax if nested else empty for state in states],
        *[state.offset.reshape(1) if nested else empty for state in states],
    ]
    shared = (torch.randn(53, 5), torch.randn(5, 128), states[0].code, states[0].state2.code if nested else empty)
    return (*shared, *parts), [functional.dequantize_4bit(packed, state) for packed, state in quantised]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_group_of_4_bit_weights_is_unpacked(nested, kind):
    made, weights = source(nested, kind)
    matrix = unpack(made, False)
    assert matrix.shape == (58, 133)
    torch.testing.assert_close(matrix[:53, :128], torch.cat(weights), rtol=1e-6, atol=1e-6)
    assert torch.equal(matrix[:53, 128:], made[0]) and torch.equal(matrix[53:, :128], made[1])


def test_small_matrices_are_copied_with_their_factors():
    torch.manual_seed(0)
    big = torch.zeros(9, 40, dtype=torch.bfloat16)
    sources, targets = [torch.randn(5, 33), torch.randn(3, 4)], [big[:5, 2:35], big[6:, 5:9]]
    ScaledCopies().run(sources, targets, [1.0, 0.5])
    for s, t, f in zip(sources, targets, (1.0, 0.5)):
        assert torch.equal(t, (s * f).bfloat16())
    assert (big != 0).sum() == sum((t != 0).sum() for t in targets)


INTERPRETED = """
import contextlib, torch
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
from test_unpack import source
from veneer.kernels.scaled_copies_triton import launch
from veneer.kernels.unpack import SHARED, unpack, unpack_gpu

for nested in (True, False):
    made, _ = source(nested)
    lists = [list(made[SHARED + 2 * i : SHARED + 2 * i + 2]) for i in range(4)]
    wanted, found = unpack(made, False), unpack_gpu(*made[:SHARED], *lists, False)
    assert torch.equal(wanted[:53], found[:53]) and torch.equal(wanted[53:, :128], found[53:, :128])
sources = [torch.randn(5, 33), torch.randn(600, 16)]
big = [torch.zeros(9, 40), torch.zeros(700, 20)]
targets = [big[0][1:6, 2:35], big[1][3:603, 1:17]]
rows = [(s.data_ptr(), t.data_ptr(), s.numel(), t.shape[1], t.stride(0)) for s, t in zip(sources, targets)]
launch(torch.tensor(rows), torch.tensor([1.0, 2.0]), sources[0], targets[0], 9600)
assert torch.equal(targets[0], sources[0]) and torch.equal(targets[1], 2 * sources[1])
assert all((b != 0).sum() == (t != 0).sum() for b, t in zip(big, targets))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_do_what_their_twins_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", ":".join([*sys.path, str(__file__).rsplit("/", 1)[0]]))
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, timeout=600)


def test_a_source_begins_with_what_the_linears_share():
    made, _ = source(True)
    assert len(made) == SHARED + 4 * 2

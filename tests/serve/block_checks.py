"""Checks of a served block's kernels that run in triton's interpreter and on a GPU."""

from __future__ import annotations

import torch

from veneer.kernels import served, served_block
from veneer.kernels.served_block_check import Trial, table_of


def check_block(tolerance, *args, **options):
    """Every kernel gives what its twin gives."""
    for name, found, wanted in Trial(*args, **options, full=True).pairs():
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        off = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        assert off <= tolerance, (name, float(off), options)


def check_base_rows(*args, **options):
    """Rows without an adapter are to the last bit what they are in a pass without any, whatever the tiles."""
    case = Trial(*args, **options)
    x, y, weight = (case.random(*shape) for shape in ((case.rows, case.D), (case.rows, case.D), (case.D,)))
    gate, up = case.random(case.rows, case.I), case.random(case.rows, case.I)
    base, plain = torch.tensor(case.places) < 0, table_of([-1] * case.rows, served.ROWS, case.device)
    update, wide = case.update(3, case.D), case.update(1, case.I, case.I)
    A, down = case.factors(case.D, 5)[0], case.factors(case.I, 5)[0]
    mine = x.clone()
    parts = served_block.add(mine, y, update, case.table, weight, A)
    normed = served_block.norm(mine, None, weight, 1e-5, parts)[0]
    own = served_block.gated(gate, up, wide, case.table, down)[0]
    wanted = x.clone()
    wanted_normed = served_block.norm(wanted, y, weight, 1e-5)[0]
    alone = served_block.gated(gate, up, None, plain, None)[0]
    for got, other in ((mine, wanted), (normed, wanted_normed), (own, alone)):
        assert torch.equal(got[base], other[base]) and not torch.equal(got[~base], other[~base])

"""Checks of a served block's kernels that run in triton's interpreter and on a GPU."""

from __future__ import annotations

import os

import torch

from veneer.kernels import served, served_attention, served_block
from veneer.kernels.served_block_check import Trial, table_of


def bounds(*ends):
    """`range` for kernels in the interpreter, whose own numbers are arrays of one element: no index for NumPy 2.4."""
    return range(*(end.handle.data.item() if hasattr(end, "handle") else int(end) for end in ends))


def patch_language_once() -> None:
    """Triton's interpreter puts its own functions into its language at each call of a jitted function within another,
    which takes a third of the time: here only where they are not there yet."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch = interpreter._patch_lang

    def once(fn):
        parts = [part for part in fn.__globals__.values() if part is language or part is language.core]
        there = parts and not any(language.core.is_builtin(part.load) for part in parts)
        return interpreter._LangPatchScope() if there else patch(fn)

    interpreter._patch_lang = once


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_language_once()


def check_block(tolerance, *args, **options):
    """Every kernel gives what its twin gives."""
    for name, found, wanted in Trial(*args, **options, full=True).pairs():
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        off = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        assert off <= tolerance, (name, float(off), options)


def check_base_rows(*args, **options):
    """Rows without an adapter are to the last bit what they are in a pass without any, whatever the tiles."""
    case = Trial(*args, **options)
    base, plain = torch.tensor(case.places) < 0, table_of([-1] * case.rows, served.ROWS, case.device)
    x, y, weight = (case.random(*shape) for shape in ((case.rows, case.D), (case.rows, case.D), (case.D,)))
    gate, up = case.random(case.rows, case.I), case.random(case.rows, case.I)
    widths = case.K * case.G * case.E, case.K * case.E, case.K * case.E
    qkv, turn = [case.random(case.rows, width) for width in widths], [case.random(case.rows, case.E) for _ in range(2)]
    slots, positions = case.where()
    stores = [case.random(case.rows, case.K, case.C, case.E) for _ in range(2)]
    qs = case.random(case.rows, case.K, case.G, case.E)
    attended = served_attention.attend_parts(qs, *stores, slots, positions, 0.3)

    def run(table, updates, A):
        mine, (keys, values) = x.clone(), (torch.zeros_like(store) for store in stores)
        if updates[0] is None:
            normed = served_block.norm(mine, y, weight, 1e-5)[0]
        else:
            parts = served_block.add(mine, y, updates[0], table, weight, A[0])
            normed = served_block.norm(mine, None, weight, 1e-5, parts)[0]
        q = served_block.rotate(qkv, updates[1], table, None, 0.0, turn, slots, positions, keys, values)
        heads = served_attention.gather(attended, table, A[1], qs)[0]
        own = [store[slots, :, positions] for store in (keys, values)]
        return [mine, normed, q, *own, served_block.gated(gate, up, updates[2], table, A[2])[0], heads]

    updates = case.update(3, case.D), case.update(1, *widths), case.update(1, case.I, case.I)
    factors = [case.factors(width, 8)[0] for width in (case.D, widths[0], case.I)]
    found, wanted = run(case.table, updates, factors), run(plain, [None] * 3, [None] * 3)
    assert all(torch.equal(got[base], other[base]) for got, other in zip(found, wanted))
    assert not any(torch.equal(got[~base], other[~base]) for got, other in zip(found[:-1], wanted))


def check_range(device, size):
    """h of a row in float16 whose largest number, times its norm's weight, is beyond float16."""
    case = Trial(torch.float16, device, size, rows=5, D=200)
    x, weight, A = case.random(5, 200), case.random(200), case.factors(200, 8)[0]
    x[:, 7], weight[7] = 5000.0, -30.0
    normed, hidden = served_block.norm(x, None, weight, 1e-5, served_block.add(x, None, None, case.table, weight, A))
    places = torch.tensor(case.places, device=device)
    wanted = torch.einsum("bi,biw->bw", normed.float(), A[places.clamp(min=0)].float())[places >= 0]
    torch.testing.assert_close(hidden.sum(0)[places >= 0], wanted, rtol=0, atol=4e-3 * float(wanted.abs().max()))

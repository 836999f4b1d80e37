"""grouped_lora's fast path, and the kernels of a served step, against float64."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.kernels import dispatch, grouped, reference, served, served_attention, served_prompts
from veneer.kernels.served import ROWS
from veneer.serve.pool import Stack
from veneer.serve.routing import Rows, Segments, plan_rows


def factors(ranks, d_in, d_out, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = [torch.randn(r, d_in, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for r in ranks]
    B = [torch.randn(d_out, r, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for r in ranks]
    return A, B, [0.5 + n for n in range(len(ranks))]


def loops(x, A, B, s, rows):
    """The definition in float64, row by row."""
    out = []
    for row, n in zip(x.double(), rows.tolist()):
        out.append(row @ A[n].double().t() @ B[n].double().t() * s[n] if n >= 0 else row.new_zeros(*row.shape[:-1], B[0].shape[0]) + 0 * row.sum())  # fmt: skip # noqa: E501
    return torch.stack(out)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(-1, 3), min_size=1, max_size=9),
    ranks=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    tokens=st.sampled_from([(), (1,), (3,), (2, 2)]),
)
def test_forward_and_backward_are_the_definition(rows, ranks, tokens):
    A, B, s = factors(ranks, 11, 5)
    x = torch.randn(len(rows), *tokens, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rows = torch.tensor(rows)
    weight = torch.randn(len(rows), *tokens, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = [x, *A, *B]
    truth = loops(x, A, B, s, rows)
    wanted = torch.autograd.grad((truth * weight).sum(), inputs, allow_unused=True)
    out = dispatch.grouped_lora(x, A, B, s, rows, impl="fast")
    assert (out - truth).abs().max() <= 1e-5 * truth.abs().max().clamp(min=1)
    assert torch.equal(out[rows < 0], torch.zeros_like(out[rows < 0]))
    if (rows < 0).all():
        return
    got = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    for mine, true in zip(got, wanted):
        true = torch.zeros(()) if true is None else true
        mine = torch.zeros_like(true) if mine is None else mine
        assert (mine - true).abs().max() <= 1e-5 * true.abs().max().clamp(min=1)


def test_one_product_for_all_groups_is_the_definition():
    """The path for GPUs runs on the CPU too."""
    if not grouped.has_grouped_mm():
        pytest.skip("this torch has no grouped_mm")
    A, B, s = factors([3, 17, 16, 5], 24, 40)
    x = torch.randn(9, 24).requires_grad_()
    rows = torch.tensor([2, -1, 0, 2, 0, 3, -1, 2, 3])
    order, runs = grouped.sort_rows(rows, 4)
    out = grouped._by_grouped_mm(x, A, B, s, order, runs)
    truth = loops(x, A, B, s, rows)
    assert (out - truth).abs().max() <= 1e-5 * truth.abs().max()
    used = [x, *A[:1], *A[2:], *B[:1], *B[2:]]
    for mine, true in zip(torch.autograd.grad(out.sum(), used), torch.autograd.grad(truth.sum(), used)):
        assert (mine - true).abs().max() <= 1e-5 * true.abs().max()


def stack(places, rank, d_in, d_outs, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(places, d_in, len(d_outs) * rank, generator=g)
    return Stack(A, [torch.randn(places, rank, o, generator=g) for o in d_outs])


uses = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, 1.0, 0.3, -2.0])), max_size=2).map(tuple)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(uses, min_size=1, max_size=8))
def test_every_plan_gives_each_row_its_adapters_and_leaves_the_base_alone(rows):
    s = stack(6, 4, 13, (5, 9))
    x, base = torch.randn(len(rows), 13), [torch.randn(len(rows), o) for o in (5, 9)]
    device = torch.device("cpu")
    plans = [plan_rows(rows, device), Segments([(n, n + 1, u) for n, u in enumerate(rows)])]
    if any(rows):
        plans.append(Rows(rows, device))
    else:
        assert plans.pop(0) is None
    for plan in plans:
        hidden = plan.shrink(x, s)
        outputs = [y.clone() for y in base]
        plan.expand(hidden, s, outputs)
        for part, (y, got) in enumerate(zip(base, outputs)):
            truth = y.double().clone()
            for n, row in enumerate(rows):
                for place, weight in row:
                    a, b = s.A[place, :, 4 * part : 4 * part + 4].double(), s.B[part][place].double()
                    truth[n] += weight * (x[n].double() @ a @ b)
            assert (got - truth).abs().max() <= 1e-5 * truth.abs().max()
            plain = [n for n, row in enumerate(rows) if not row]
            assert torch.equal(got[plain], y[plain])


def served_inputs(dtype, device="cpu", rows=37, uses=3, d_in=252, d_outs=(507, 64), rank=16, places=4, most=ROWS + 2):
    """x, A, each target's B and y, tiles, weights, and each row's places; the first `most` rows use place 2 alone."""
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, uses + 1, (rows,), generator=g).tolist()
    where = [torch.randint(0, places, (count,), generator=g).tolist() for count in counts]
    where[:most], where[-1] = [[2]] * most, []
    x, A = torch.randn(rows, d_in, generator=g), torch.randn(places, d_in, len(d_outs) * rank, generator=g)
    B = [torch.randn(places, rank, o, generator=g).to(device, dtype) for o in d_outs]
    y = [torch.randn(rows, o, generator=g).to(device, dtype) for o in d_outs]
    weights, tiles = torch.rand(rows, uses, generator=g).to(device), tiles_of(where, uses).to(device)
    return x.to(device, dtype), A.to(device, dtype), B, y, tiles, weights, where


def tiles_of(where, uses):
    return torch.tensor(served.tile_rows(where, uses)).view(uses, len(where), 1 + ROWS)


def check_update(tolerance, *inputs):
    """Shrink and expand together are Σ w B A x in float64, and leave rows without an adapter as they were."""
    x, A, B, y, tiles, weights, where = inputs
    got, rank = [t.clone() for t in y], B[0].shape[1]
    served.expand(served.shrink(x, A, tiles), B, tiles, weights, got)
    for part, (before, after, b) in enumerate(zip(y, got, B)):
        truth = before.double().clone()
        for n, places in enumerate(where):
            for use, place in enumerate(places):
                a = A[place, :, part * rank : (part + 1) * rank].double()
                truth[n] += weights[n, use].double() * (x[n].double() @ a @ b[place].double())
        assert (after - truth).abs().max() <= tolerance * truth.abs().max()
        plain = [n for n, places in enumerate(where) if not places]
        assert plain and torch.equal(after[plain], before[plain])
    return got


def check_neighbours(*inputs):
    """A row's result is the same to the last bit when it is alone, and when others share its tile."""
    x, A, B, y, tiles, weights, where = inputs
    among = [t.clone() for t in y]
    served.expand(served.shrink(x, A, tiles), B, tiles, weights, among)
    for kept in (0, 5, ROWS + 1, len(where) - 2):
        own = tiles_of([places if n == kept else [] for n, places in enumerate(where)], tiles.shape[0]).to(x.device)
        alone = [t.clone() for t in y]
        served.expand(served.shrink(x, A, own), B, own, weights, alone)
        assert all(torch.equal(one[kept], all_[kept]) for one, all_ in zip(alone, among))


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=40))
def test_tiles_hold_each_use_once_and_the_full_ones_come_first(rows):
    tiles = tiles_of(rows, 3)
    assert [[place for place in places if place >= 0] for places in served.places_of(tiles, len(rows)).tolist()] == rows
    assert sorted(n for n in tiles[0, :, 1:].flatten().tolist() if n >= 0) == list(range(len(rows)))
    assert (tiles[1:, :, 1:] >= 0).sum() == sum(max(0, len(places) - 1) for places in rows)
    assert all((t[t[:, 1] < 0] < 0).all() for t in tiles) and (tiles[1:, :, 0] >= 0).eq(tiles[1:, :, 1] >= 0).all()
    assert all((t[:-1, 1] >= 0).ge(t[1:, 1] >= 0).all() for t in tiles)


def test_the_twins_of_the_served_step_are_its_definition():
    """Shrink and expand together are Σ w B A x; attention over slots is softmax over each slot's own keys."""
    check_update(1e-5, *served_inputs(torch.float32))
    q, keys, values = torch.randn(3, 2, 4, 8), torch.randn(4, 2, 30, 8), torch.randn(4, 2, 30, 8)
    slots, positions = torch.tensor([2, 0, 3]), torch.tensor([0, 29, 11])
    for window in (None, 5):
        got = served_attention.attend_twin(q, keys, values, slots, positions, 0.3, window)
        for b, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist())):
            first = 0 if window is None else max(0, position + 1 - window)
            k, v = keys[slot, :, first : position + 1].double(), values[slot, :, first : position + 1].double()
            p = (torch.einsum("kgd,kcd->kgc", q[b].double(), k) * 0.3).softmax(-1)
            assert (got[b] - torch.einsum("kgc,kcd->kgd", p, v)).abs().max() < 1e-5


PIECES = [(2, 0, 70), (0, 5, 1), (3, 61, 67), (1, 129, 33)]
"""(slot, position of the first token, tokens): whole prompts, a single token, later chunks."""


def check_pieces(tolerance, dtype=torch.float32, device="cpu", K=2, G=3, D=12, C=162, window=None):
    """Attention of pieces is softmax over each slot's own keys up to each row's position; padding's rows are zeros."""
    g, rows = torch.Generator().manual_seed(0), sum(count for *_, count in PIECES)
    q = torch.randn(rows + 5, K * G, D, generator=g).to(device, dtype)
    keys, values = (torch.randn(4, K, C, D, generator=g).to(device, dtype) for _ in range(2))
    tiles = served_prompts.piece_tiles(PIECES, served_prompts.most_tiles(rows + 5, 4, served_prompts.QUERIES))
    got, start = served_prompts.attend_pieces(q, keys, values, tiles.to(device), 0.3, window), 0
    for slot, first, count in PIECES:
        position, n = first + torch.arange(count, device=device)[:, None], torch.arange(first + count, device=device)
        unseen = (n > position) | (n <= position - (window or C))
        k, v = (t[slot, :, : first + count].double().repeat_interleave(G, 0) for t in (keys, values))
        scores = (torch.einsum("thd,hnd->htn", q[start : start + count].double(), k) * 0.3).masked_fill(unseen, -1e9)
        truth = torch.einsum("htn,hnd->thd", scores.softmax(-1), v)
        assert (got[start : start + count] - truth).abs().max() <= tolerance * truth.abs().max()
        start += count
    assert not got[rows:].any()


def check_prompt_update(tolerance, dtype=torch.float32, device="cpu"):
    """Many rows of an adapter in larger tiles: the update is that of single rows, whatever else is in the pass."""
    runs = [(0, 70, [2]), (70, 71, [0, 2]), (71, 138, []), (138, 171, [1, 1])]
    where = [places for start, end, places in runs for _ in range(start, end)] + [[]] * 5
    x, A, B, y, _, _, _ = served_inputs(dtype, device, rows=len(where))
    weights = torch.rand(len(where), 2, generator=torch.Generator().manual_seed(1)).to(device)
    count = served_prompts.most_tiles(len(where), len(runs), served_prompts.ROWS)
    tiles = served_prompts.use_tiles(runs, 2, count).to(device)
    assert [[p for p in places if p >= 0] for places in served.places_of(tiles, len(where)).tolist()] == where
    among = check_update(tolerance, x, A, B, y, tiles, weights, where)
    alone, own = [t.clone() for t in y], served_prompts.use_tiles(runs[:1], 2, count).to(device)
    served.expand(served.shrink(x, A, own), B, own, weights, alone)
    assert all(torch.equal(one[:70], all_[:70]) for one, all_ in zip(alone, among))


@pytest.mark.parametrize("window", [None, 9])
def test_the_twins_of_prompts_are_their_definition(window):
    check_pieces(1e-5, window=window)
    check_prompt_update(1e-5)


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("width", [16, 64, 128, 256, 512])
def test_a_program_of_attention_has_whole_parts_of_a_tile(width, element):
    """No fewer rows than a product has, and no more than fit: q, keys and values at most 16 KiB each."""
    rows = served_prompts.program_rows(width, element)
    assert served_prompts.QUERIES % rows == 0 and (rows == 16 or rows > 16 and rows * width * element <= 16384)


INTERPRETED = """
import torch
from block_checks import bounds
from test_grouped import check_neighbours, check_pieces, check_prompt_update, check_update, served_inputs
from veneer.kernels import served, served_attention, served_prompts
from veneer.kernels.served_check import Shapes, deviation

assert served._runs(torch.empty(1))
for sizes in ({}, {"rank": 64, "d_outs": (70,), "uses": 1}, {"rank": 32, "d_outs": (48, 80, 33, 70), "d_in": 1000}):
    check_update(1e-5, *served_inputs(torch.float32, **sizes))
check_update(2e-3, *served_inputs(torch.float16))
check_neighbours(*served_inputs(torch.float32, uses=2))
served_prompts.range = served_attention.range = bounds
for window in (None, 9):
    check_pieces(1e-5, window=window)
check_pieces(2e-3, torch.float16, D=64)
check_pieces(1e-5, K=1, G=2, D=200)  # of wide heads, a program has some of a tile's rows
check_prompt_update(1e-5)
for heads, window, dtype in (((1, 5, 80), 1, "float32"), ((1, 3, 96), 70, "float16"), ((1, 1, 256), 300, "float32")):
    tried = Shapes(linears=((130, (48,)),) if window == 1 else (), heads=heads, windows=(window,))
    assert deviation(torch.device("cpu"), getattr(torch, dtype), tried) <= (1e-5 if dtype == "float32" else 5e-3)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_of_the_served_step_interpreted(monkeypatch):
    """In float32 and float16: the interpreter has no products of bfloat16."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", ":".join([*sys.path, str(__file__).rsplit("/", 1)[0]]))
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, timeout=600)


def test_linear_routes_through_the_fast_path():
    A, B, s = factors([2, 3], 6, 4)
    x, rows = torch.randn(3, 2, 6), torch.tensor([1, -1, 0])
    assert torch.equal(
        dispatch.grouped_lora(x, A, B, s), reference.grouped_lora(x, A, B, s)
    )  # a sum over all has no rows to sort
    with pytest.raises(ValueError, match="every row"):
        dispatch.grouped_lora(x, A, B, s, impl="fast")
    torch.testing.assert_close(dispatch.grouped_lora(x, A, B, s, rows), reference.grouped_lora(x, A, B, s, rows))

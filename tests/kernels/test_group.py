"""Linears of one input as one function over one packed matrix, against float64 truth and the plain twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.kernels import group
from veneer.kernels.group import graph_groups, lora_group, lora_member, packed_size, parts

SIZES = [(13,), (29, 31), (17, 5, 7), (8, 3, 3, 11)]


def make(sizes, ranks, width=23, tokens=19, dtype=torch.float32, biases=(), seed=0):
    """Weights, factors and their packed matrix; the factors have gradients."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    x = rand(tokens, width).requires_grad_()
    weights = [rand(n, width) for n in sizes]
    lora_A = [rand(r, width).requires_grad_() for r in ranks]
    lora_B = [rand(n, r).requires_grad_() for n, r in zip(sizes, ranks)]
    scales = [0.5 * (i + 1) for i in range(len(sizes))]
    packed = torch.zeros(packed_size(sizes, ranks, width), dtype=dtype)
    for (w, a, b), *values, s in zip(parts(packed, sizes, ranks), weights, lora_A, lora_B, scales):
        for place, value in zip((w, a, b), (values[0], values[1], s * values[2])):
            place.copy_(value.detach())
    scaling = torch.tensor([s for s, r in zip(scales, ranks) for _ in range(r)], dtype=torch.float32)
    bias = [rand(n) if i in biases else None for i, n in enumerate(sizes)]
    return x, packed, scaling, bias, weights, lora_A, lora_B, scales


def truth(x, weights, bias, lora_A, lora_B, scales):
    return [
        F.linear(x, w, b) + s * F.linear(F.linear(x, a), up)
        for w, b, a, up, s in zip(weights, bias, lora_A, lora_B, scales)
    ]


def in_double(tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def assert_as_good(found, plain, exact, slack=1e-6):
    """No further from the truth than twice what plain arithmetic is, and a rounding."""
    for f, p, e in zip(found, plain, exact, strict=True):
        scale = e.abs().max()
        assert (f.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + slack * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_group_is_its_linears(sizes, dtype):
    ranks = tuple(2 + i for i in range(len(sizes)))
    x, packed, scaling, bias, weights, lora_A, lora_B, scales = make(sizes, ranks, dtype=dtype, biases=(0, 2))
    grads = [torch.randn(19, n).to(dtype) for n in sizes]
    wanted = [x, *lora_A, *lora_B]
    outs = lora_group(x, (packed,), scaling, sizes, ranks, bias, lora_A, lora_B)
    plain = truth(x, weights, bias, lora_A, lora_B, scales)
    x64, *rest = in_double([x, *weights, *bias, *lora_A, *lora_B])
    n = len(sizes)
    exact = truth(x64, rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :], scales)
    slack = 4 * torch.finfo(dtype).eps
    assert_as_good(outs, plain, exact, slack)
    found, naive = (torch.autograd.grad(o, wanted, grads) for o in (outs, plain))
    assert_as_good(found, naive, torch.autograd.grad(exact, [x64, *rest[2 * n :]], [g.double() for g in grads]), slack)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(0, 7),
    st.integers(0, 99),
)
def test_one_product_and_several_give_the_same_gradients(members, width, tokens, seed):
    sizes, ranks = zip(*members)
    x, packed, scaling, *_ = make(sizes, ranks, width, tokens, torch.float64, seed=seed)
    low = x @ parts_of_bottom(packed, sizes, width).t()
    grads = [torch.randn(tokens, n, dtype=torch.float64) for n in sizes]
    arguments = (grads, x.detach(), low.detach(), packed, scaling.double(), sizes, ranks, True)
    one, several = group.joined_gradients(*arguments), group.separate_gradients(*arguments)
    for a, b in zip([one[0], *one[1]], [several[0], *several[1]], strict=True):
        torch.testing.assert_close(a, b)


def parts_of_bottom(packed, sizes, width):
    return packed[sum(sizes) :, :width]


def test_without_a_gradient_to_x_there_is_none():
    x, packed, scaling, bias, _, lora_A, lora_B, _ = make((5, 6), (2, 3))
    outs = lora_group(x.detach(), (packed,), scaling, (5, 6), (2, 3), bias, lora_A, lora_B)
    torch.autograd.grad(sum(o.sum() for o in outs), [*lora_A, *lora_B])
    with pytest.raises(RuntimeError, match="not.*used|does not require grad"):
        torch.autograd.grad(sum(o.sum() for o in outs), [x])


@pytest.mark.parametrize("whole", [True, False])
def test_members_of_one_input_become_a_group_in_a_traced_graph(whole):
    sizes, ranks = (6, 4), (2, 3)
    x, packed, scaling, bias, _, lora_A, lora_B, _ = make(sizes, ranks)
    calls = []

    def function(x, packed, scaling, lora_A, lora_B):
        y = x * 2
        members = range(2) if whole else range(1)
        return [lora_member(y, (packed,), scaling, sizes, ranks, i, None, lora_A[i], lora_B[i]) for i in members]

    def backend(graph, inputs):
        graph_groups(graph)
        calls.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    outs = torch.compile(function, backend=backend, fullgraph=True)(x, packed, scaling, lora_A, lora_B)
    assert (lora_group in calls, lora_member in calls) == (whole, not whole)
    for out, wanted in zip(outs, function(x, packed, scaling, lora_A, lora_B)):
        torch.testing.assert_close(out, wanted)


def test_the_operator_keeps_torchs_rules():
    wide, matrix = torch.randn(7, 9), torch.randn(4, 5)
    torch.library.opcheck(torch.ops.veneer.append_product.default, (wide.clone(), matrix))
    low = torch.ops.veneer.append_product(wide, matrix)
    torch.testing.assert_close(low, wide[:, :5] @ matrix.t())
    assert torch.equal(wide[:, 5:], low)

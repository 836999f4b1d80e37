"""The gated activation and the gated MLP of packed groups: against float64 truth, interpreted, and found in graphs."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from test_group import assert_as_good, in_double, make, truth

from veneer.kernels.gated import ACTIVATIONS, gated
from veneer.kernels.gated_mlp import gated_mlp, graph_gated_mlps
from veneer.kernels.group import factor_views, graph_groups, lora_group, lora_member
from veneer.kernels.unpack import unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH, HIDDEN, TOKENS, RANKS = 11, 37, 19, (2, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_backward_pass_of_a_gated_activation(kind, dtype):
    torch.manual_seed(0)
    g, u, d = (3 * torch.randn(TOKENS, HIDDEN).to(dtype) for _ in range(3))
    g[0, :4] = torch.tensor([0.0, -80.0, 80.0, 1e-3])
    g64, u64 = (t.double().requires_grad_() for t in (g, u))
    h64 = gated(g64, u64, kind)
    h64.backward(d.double())
    h = d.clone()
    wide = torch.ops.veneer.gated_backward(g, u, h, 5, kind)
    assert wide.shape == (TOKENS, 2 * HIDDEN + 5)
    bound = 1e-5 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps  # one rounding
    for found, wanted in zip((*wide[:, : 2 * HIDDEN].chunk(2, 1), h), (g64.grad, u64.grad, h64.detach())):
        assert ((found.double() - wanted).abs() <= bound * wanted.abs() + 1e-6).all()


def test_the_operator_keeps_torchs_rules():
    g, u, d = (torch.randn(4, 6) for _ in range(3))
    torch.library.opcheck(torch.ops.veneer.gated_backward.default, (g, u, d, 0, "silu"))


INTERPRETED = """
import contextlib, torch
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
from veneer.kernels import gated_triton
from veneer.kernels.gated import ACTIVATIONS, gated_backward_gpu, gated_backward_plain

gated_triton.COLUMNS = 16
torch.manual_seed(0)
for kind in ACTIVATIONS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        big = (3 * torch.randn(7, 120)).to(dtype)
        g, u, d = big[:, 1:38], big[:, 40:77], (3 * torch.randn(37, 7)).to(dtype).t()
        h, wanted_h = d.clone(memory_format=torch.preserve_format), d.clone()
        found, wanted = gated_backward_gpu(g, u, h, 3, kind), gated_backward_plain(g, u, wanted_h, 3, kind)
        close = dict(rtol=1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps, atol=1e-5)
        torch.testing.assert_close(found[:, :74], wanted[:, :74], **close)
        torch.testing.assert_close(h, wanted_h, **close)
        assert found.shape == (7, 77)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_does_what_its_twin_does(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, timeout=600)


def groups(dtype, biases=()):
    """x, gate and up's group and down's as `lora_group` wants them, and what `truth` wants of each."""
    x, *first = make((HIDDEN, HIDDEN), RANKS, WIDTH, TOKENS, dtype, biases)
    _, *last = make((WIDTH,), (4,), HIDDEN, TOKENS, dtype, biases, seed=1)
    plain, packed = [], []
    for (matrix, scaling, bias, weights, lora_A, lora_B, scales), ranks in ((first, RANKS), (last, (4,))):
        sizes = tuple(w.shape[0] for w in weights)
        packed.append(((matrix,), scaling, sizes, ranks, bias, lora_A, lora_B))
        plain.append((weights, bias, lora_A, lora_B, scales))
    return x, packed, plain


def mlp(x, first, last, kind):
    gate, up = truth(x, *first)
    return truth(gated(gate, up, kind), *last)[0]


@pytest.mark.parametrize("low_again", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_gated_mlp_is_its_linears_and_activation(kind, dtype, low_again):
    x, packed, plain = groups(dtype, biases=(0, 1))
    exact = [[in_double(part) for part in group[:4]] + [group[4]] for group in plain]
    (x64,) = in_double([x])
    outs = gated_mlp(x, kind, *packed, True, low_again), mlp(x, *plain, kind), mlp(x64, *exact, kind)
    assert_as_good(*([out] for out in outs), 4 * torch.finfo(dtype).eps)
    upstream = torch.randn(TOKENS, WIDTH).to(dtype)
    wanted = [[start, *(t for group in ways for part in group[2:4] for t in part)] for start, ways in
              ((x, plain), (x, plain), (x64, exact))]  # fmt: skip
    grads = [torch.autograd.grad(out, leaves, upstream.to(out.dtype)) for out, leaves in zip(outs, wanted)]
    assert_as_good(*grads, 4 * torch.finfo(dtype).eps)


def test_without_a_gradient_to_x_the_factors_have_theirs():
    x, packed, plain = groups(torch.float64)
    factors = [t for group in plain for part in group[2:4] for t in part]
    found = torch.autograd.grad(gated_mlp(x.detach(), "silu", *packed, True, False).sum(), factors)
    for a, b in zip(found, torch.autograd.grad(mlp(x, *plain, "silu").sum(), factors), strict=True):
        torch.testing.assert_close(a, b)


def member(x, group, index):
    source, scaling, sizes, ranks, bias, lora_A, lora_B = group
    return lora_member(x, source, scaling, sizes, ranks, index, bias[index], lora_A[index], lora_B[index])


BLOCKS = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "up first": lambda gate, up: up * torch.nn.SiLU()(gate),
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "no product": lambda gate, up: F.silu(gate) + up,
    "dropout": lambda gate, up: F.dropout(F.silu(gate) * up, 0.5),
    "gate used twice": lambda gate, up: F.silu(gate) * up + 0 * gate,
    "activated up": lambda gate, up: gate * F.silu(up),
    "up alone": lambda gate, up: F.silu(up) * up + 0 * gate,
}
FOUND = ("silu", "up first", "gelu", "gelu_tanh")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_gated_mlp_is_found_in_a_traced_graph(name):
    x, (first, last), _ = groups(torch.float64)
    calls = []

    def function(x, first, last):
        x = x + 1
        return member(BLOCKS[name](member(x, first, 0), member(x, first, 1)), last, 0) * 2

    def backend(graph, inputs):
        graph_groups(graph)
        graph_gated_mlps(graph)
        graph.graph.lint()
        calls.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    out = torch.compile(function, backend=backend, fullgraph=True)(x, first, last)
    found = name in FOUND
    assert (calls.count(gated_mlp), calls.count(lora_group)) == ((1, 0) if found else (0, 2))
    if name != "dropout":
        leaves = [x, *first[5], *first[6], *last[5], *last[6]]
        wanted = function(x, first, last)
        torch.testing.assert_close(out, wanted)
        mine, theirs = torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.3, 0.0])
def test_the_input_of_down_is_never_kept(keep):
    from veneer.kernels.compiling import compile_or_plain

    x, (first, last), _ = groups(torch.float32)

    def function(x, first, last):
        return member(F.silu(member(x, first, 0)) * member(x, first, 1), last, 0)

    kept = []
    fast = compile_or_plain(function, keep=keep, note=pytest.fail)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fast(x, first, last)
    leaves = [x, *first[5], *first[6], *last[5], *last[6]]
    mine = torch.autograd.grad(out.sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad(function(x, first, last).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
    wide = [t for t in kept if t.shape == (TOKENS, HIDDEN)]
    assert len(wide) == {1.0: 2, 0.9: 2, 0.3: 0, 0.0: 0}[keep]
    gate, up = member(x, first, 0), member(x, first, 1)
    for found, wanted in zip(sorted(wide, key=lambda t: t[0, 0]), sorted((gate, up), key=lambda t: t[0, 0])):
        torch.testing.assert_close(found, wanted)


def four_bit_group(sizes, ranks, width, seed):
    """A group of NF4 weights, and the same group with its matrix made once."""
    functional = pytest.importorskip("bitsandbytes").functional
    x, _, scaling, bias, weights, lora_A, lora_B, scales = make(sizes, ranks, width, seed=seed)
    quantised = [functional.quantize_4bit(0.3 * w, compress_statistics=False, quant_type="nf4") for w in weights]
    empty, states = torch.empty(0), [state for _, state in quantised]
    side, bottom = torch.zeros(sum(sizes), sum(ranks)), torch.zeros(sum(ranks), width)
    for (a, b), down, up, s in zip(factor_views(side, bottom, sizes, ranks), lora_A, lora_B, scales):
        a.copy_(down.detach())
        b.copy_(s * up.detach())
    lists = [*[q.view(-1) for q, _ in quantised], *[state.absmax for state in states], *[empty] * (2 * len(sizes))]
    source = (side, bottom, states[0].code, empty, *lists)
    rest = (scaling, sizes, ranks, bias, lora_A, lora_B)
    return x, (source, *rest), ((unpack(source, False),), *rest)


@pytest.mark.parametrize("keep", [1.0, 0.0])
def test_a_gated_mlp_of_4_bit_weights(keep):
    from veneer.kernels.compiling import compile_or_plain

    x, first, first_dense = four_bit_group((32, 32), (2, 3), 16, 0)
    _, last, last_dense = four_bit_group((16,), (4,), 32, 1)

    def function(x, first, last):
        return member(F.silu(member(x, first, 0)) * member(x, first, 1), last, 0)

    torch._dynamo.reset()
    out = compile_or_plain(function, keep=keep, note=pytest.fail)(x, first, last)
    wanted = function(x, first_dense, last_dense)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    leaves = [x, *first[5], *first[6], *last[5], *last[6]]
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (out, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))

"""Fast paths against float32 (or float64) truth: whole tensors and every gradient, on odd sizes."""

import pytest
import torch

from veneer.kernels import attention, dispatch, reference

SHAPES = [((3, 5), 7, 11, 2), ((1, 123), 252, 507, 16), ((2, 1, 3), 9, 4, 4)]


def grads(function, inputs, upstream):
    inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    out = function(*inputs)
    out.backward(upstream.to(out.dtype))
    return out.detach(), [t.grad for t in inputs if t.requires_grad]


def assert_as_good(fast, naive, truth, dtype, roundings=2):
    """The fast path's largest error may not exceed the naive one's by more than a few roundings of the compute dtype."""
    scale = truth.abs().max().clamp_min(1e-12)
    fast_error = (fast.double() - truth).abs().max() / scale
    naive_error = (naive.double() - truth).abs().max() / scale
    assert fast_error <= naive_error + roundings * torch.finfo(dtype).eps, (float(fast_error), float(naive_error))


@pytest.mark.parametrize("shape,d_in,d_out,rank", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_linear(shape, d_in, d_out, rank, dtype, bias):
    torch.manual_seed(0)
    x = torch.randn(*shape, d_in, dtype=dtype, requires_grad=True)
    w = torch.randn(d_out, d_in, dtype=dtype) / d_in**0.5
    b = torch.randn(d_out, dtype=dtype, requires_grad=True) if bias else None
    lora_A, lora_B = (torch.randn(rank, d_in) / d_in**0.5).requires_grad_(), torch.randn(d_out, rank).requires_grad_()
    upstream = torch.randn(*shape, d_out)
    inputs = [x, lora_A, lora_B] + ([b] if bias else [])

    def run(impl, *t):
        return dispatch.lora_linear(t[0], w.to(t[0].dtype), t[3] if bias else None, t[1], t[2], 0.7, impl=impl)

    fast = grads(lambda *t: run("fast", *t), inputs, upstream)
    naive = grads(lambda *t: run("reference", *t), inputs, upstream)
    truth = grads(lambda *t: run("reference", *t), [t.double().detach().requires_grad_() for t in inputs], upstream)
    assert fast[0].dtype == dtype
    assert_as_good(fast[0], naive[0], truth[0], dtype)
    for f, n, t in zip(fast[1], naive[1], truth[1], strict=True):
        assert f.dtype == n.dtype
        assert_as_good(f, n, t, dtype)


@pytest.mark.parametrize("frozen", [(), (0,), (2,), (3,), (0, 1, 2), (1, 2, 3)])
def test_lora_linear_gradcheck(frozen):
    torch.manual_seed(1)
    x, w, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64), torch.randn(4).double()
    lora_A, lora_B = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    inputs = [t.requires_grad_(i not in frozen) for i, t in enumerate((x, b, lora_A, lora_B))]
    assert torch.autograd.gradcheck(lambda x, b, a, c: dispatch.lora_linear(x, w, b, a, c, 1.3, impl="fast"), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["AB", "B", ""])
def test_lora_linear_with_a_frozen_A_keeps_the_low_rank_product_in_place_of_x(dtype, trained):
    torch.manual_seed(0)
    x, w = torch.randn(2, 41, 252, dtype=dtype, requires_grad=True), torch.randn(57, 252, dtype=dtype)
    lora_A, lora_B = torch.randn(3, 252, requires_grad="A" in trained), torch.randn(57, 3, requires_grad="B" in trained)
    kept = []

    def keep(t):
        if not any(t.data_ptr() == other.data_ptr() for other in (w, lora_A, lora_B)):
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = dispatch.lora_linear(x, w, None, lora_A, lora_B, 0.7, impl="fast")
    assert kept == {"AB": [82 * 252], "B": [82 * 3], "": []}[trained]
    upstream = torch.randn(y.shape).to(dtype)
    fast = torch.autograd.grad(y, [t for t in (x, lora_B) if t.requires_grad], upstream)
    naive_x, naive_b = (t.detach().requires_grad_(t.requires_grad) for t in (x, lora_B))
    y = dispatch.lora_linear(naive_x, w, None, lora_A, naive_b, 0.7, impl="reference")
    naive = torch.autograd.grad(y, [t for t in (naive_x, naive_b) if t.requires_grad], upstream)
    exact_x, exact_b = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, lora_B))
    y = reference.lora_linear(exact_x, w.double(), None, lora_A.double(), exact_b, 0.7)
    truth = torch.autograd.grad(y, [t for t in (exact_x, exact_b) if t.requires_grad], upstream.double())
    for f, n, t in zip(fast, naive, truth, strict=True):
        assert_as_good(f, n, t, dtype)


def test_lora_linear_gives_the_frozen_weight_no_gradient_and_refuses_a_trained_one():
    x, w = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    factors = torch.randn(1, 3, requires_grad=True), torch.randn(4, 1)
    with pytest.raises(ValueError, match="weight is trained"):
        dispatch.lora_linear(x, w, None, *factors, 1.0, impl="fast")
    dispatch.lora_linear(x, w, None, *factors, 1.0).sum().backward()
    assert w.grad is not None  # auto takes the twin


@pytest.mark.parametrize("softcap,scale", [(None, 1.0), (5.0, 1.0), (None, 0.3), (7.0, 2.0)])
@pytest.mark.parametrize("chunk", [1 << 30, 4 * 507 * 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy(monkeypatch, softcap, scale, chunk, dtype):
    from veneer.kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(13, 29, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(507, 29, dtype=dtype), torch.randn(507, dtype=dtype)
    targets = torch.randint(0, 507, (13,))

    def run(impl, h):
        options = {"softcap": softcap, "logit_scale": scale, "impl": impl}
        return dispatch.linear_cross_entropy(h, weight.to(h.dtype), bias.to(h.dtype), targets, **options)

    up = torch.tensor(0.37)
    fast, naive = (grads(lambda h, i=i: run(i, h), [hidden], up) for i in ("fast", "reference"))

    def exact(h):
        z = (h @ weight.double().T + bias.double()) * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return (z.logsumexp(-1) - z[torch.arange(13), targets]).sum()

    truth = grads(exact, [hidden.detach().double().requires_grad_()], up)
    assert_as_good(fast[0], naive[0], truth[0], dtype, roundings=8)
    assert_as_good(fast[1][0], naive[1][0], truth[1][0], dtype, roundings=8)


def test_linear_cross_entropy_of_nothing_is_zero():
    loss = dispatch.linear_cross_entropy(
        torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4), None, torch.zeros(0).long()
    )
    assert loss == 0


def test_grouped_lora_rows_and_stack():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 7)
    factors = [(torch.randn(r, 7), torch.randn(5, r)) for r in (1, 2, 4)]
    lora_A, lora_B, s = [a for a, _ in factors], [b for _, b in factors], [0.5, -2.0, 3.0]
    alone = [s[n] * (x @ lora_A[n].T @ lora_B[n].T) for n in range(3)]
    torch.testing.assert_close(reference.grouped_lora(x, lora_A, lora_B, s), sum(alone))
    out = reference.grouped_lora(x, lora_A, lora_B, s, torch.tensor([2, -1, 0, 2]))
    torch.testing.assert_close(out, torch.stack([alone[2][0], torch.zeros(3, 5), alone[0][2], alone[2][3]]))
    assert (out[1] == 0).all()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads,kv", [(6, 2), (3, 3)])
def test_packed_attention(window, heads, kv):
    torch.manual_seed(0)
    segments = [(0, 9, 0, 0), (9, 14, 0, 9), (14, 15, 0, 9), (15, 22, 15, 15), (22, 25, 15, 22)]
    q = torch.randn(1, heads, 25, 8, requires_grad=True)
    k, v = (torch.randn(1, kv, 25, 8, requires_grad=True) for _ in range(2))
    up = torch.randn(1, 25, heads, 8)

    def run(f, *t):
        return f(*t, segments, window=window, scale=0.3)

    fast = grads(lambda *t: run(attention.packed_attention, *t), [q, k, v], up)
    slow = grads(lambda *t: run(attention.dense_packed_attention, *t), [q, k, v], up)
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-5, atol=1e-5)
    for f, s in zip(fast[1], slow[1], strict=True):
        torch.testing.assert_close(f, s, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape,d_in,d_out,rank", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_dora_linear(shape, d_in, d_out, rank, dtype, bias):
    torch.manual_seed(0)
    x = torch.randn(*shape, d_in, dtype=dtype, requires_grad=True)
    w = torch.randn(d_out, d_in, dtype=dtype) / d_in**0.5
    b = torch.randn(d_out, dtype=dtype, requires_grad=True) if bias else None
    lora_A, lora_B = (torch.randn(rank, d_in) / d_in**0.5).requires_grad_(), torch.randn(d_out, rank).requires_grad_()
    m, norm = (torch.rand(d_out) + 0.5).requires_grad_(), torch.rand(d_out) + 0.5
    upstream = torch.randn(*shape, d_out)
    inputs = [x, lora_A, lora_B, m] + ([b] if bias else [])

    def run(impl, *t):
        bias = t[4] if len(t) > 4 else None
        return dispatch.dora_linear(t[0], w.to(t[0].dtype), bias, t[1], t[2], t[3], norm.to(t[3].dtype), 0.7, impl=impl)

    fast = grads(lambda *t: run("fast", *t), inputs, upstream)
    naive = grads(lambda *t: run("reference", *t), inputs, upstream)
    truth = grads(lambda *t: run("reference", *t), [t.double().detach().requires_grad_() for t in inputs], upstream)
    assert fast[0].dtype == dtype
    assert_as_good(fast[0], naive[0], truth[0], dtype, roundings=4)
    for f, n, t in zip(fast[1], naive[1], truth[1], strict=True):
        assert f.dtype == n.dtype
        assert_as_good(f, n, t, dtype, roundings=4)


def test_dora_linear_gradcheck():
    torch.manual_seed(1)
    x, w, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64), torch.randn(4).double()
    lora_A, lora_B = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    m, norm = torch.rand(4).double() + 0.5, torch.rand(4).double() + 0.5
    inputs = [t.requires_grad_() for t in (x, b, lora_A, lora_B, m)]
    assert torch.autograd.gradcheck(
        lambda x, b, a, c, m: dispatch.dora_linear(x, w, b, a, c, m, norm, 1.3, impl="fast"), inputs
    )


@pytest.mark.parametrize("device", ["cpu"])
def test_autocast_takes_the_twin(device):
    """Under autocast the operations choose their dtypes: the fused function, which assumes one, stands back."""
    x, w = torch.randn(3, 5), torch.randn(4, 5)
    lora_A, lora_B = torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = dispatch.lora_linear(x, w, None, lora_A, lora_B, 0.5)
        with pytest.raises(ValueError, match="autocast"):
            dispatch.lora_linear(x, w, None, lora_A, lora_B, 0.5, impl="fast")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), x @ w.T + 0.5 * x @ lora_A.T @ lora_B.T, rtol=3e-2, atol=3e-2)

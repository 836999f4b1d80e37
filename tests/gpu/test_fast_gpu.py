"""The fast step on an NVIDIA GPU: attention over packed rows, compiled blocks, the memory dial, the head, the optimiser."""

import pytest
import torch

import veneer
from conftest import GPU_SIZES, tiny_llama
from veneer.config import OptimConfig
from veneer.kernels import attention, dispatch, gated
from veneer.training.accelerate import Accelerated
from veneer.training.flat import FlatOptimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.mark.parametrize(
    "segments,window",
    [
        ([(0, 37, 0, 0), (37, 100, 0, 0), (100, 105, 0, 0)], None),
        ([(0, 64, 0, 0), (64, 128, 0, 0)], None),
        ([(0, 40, 0, 0), (40, 77, 0, 40), (77, 100, 0, 40), (100, 131, 0, 0)], None),
        ([(0, 90, 0, 0), (90, 131, 0, 0)], 16),
    ],
    ids=["lengths", "equal", "prefix", "window"],
)
def test_one_kernel_for_packed_rows(segments, window):
    """Against the dense definition in float32: error at most the naive half-precision one's and a few roundings."""
    if not attention.has_varlen():
        pytest.skip("this torch has no attention over several lengths")
    torch.manual_seed(0)
    length = segments[-1][1]
    shapes = [(1, 4, length, 64), (1, 2, length, 64), (1, 2, length, 64)]
    inputs = [torch.randn(shape, device="cuda") for shape in shapes]
    upstream = torch.randn(1, length, 4, 64, device="cuda")
    layout = attention.Layout.of(segments, torch.device("cuda"))

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = function(*leaves)
        out.backward(upstream.to(dtype))
        return [out.detach(), *(t.grad for t in leaves)]

    fast = run(lambda q, k, v: attention.layout_attention(q, k, v, layout, window=window), torch.bfloat16)
    naive = run(lambda q, k, v: attention.dense_packed_attention(q, k, v, segments, window=window), torch.bfloat16)
    truth = run(lambda q, k, v: attention.dense_packed_attention(q, k, v, segments, window=window), torch.float64)
    for f, n, t in zip(fast, naive, truth, strict=True):
        scale = t.abs().max()
        error, allowed = (f.double() - t).abs().max() / scale, (n.double() - t).abs().max() / scale
        assert error <= allowed + 4 * torch.finfo(torch.bfloat16).eps, (float(error), float(allowed))


@pytest.mark.parametrize("vocabulary", [1003, 70_001])
@pytest.mark.parametrize("softcap,scale", [(None, 1.0), (30.0, 0.5)])
def test_the_heads_loss_in_chunks(softcap, scale, vocabulary, monkeypatch):
    monkeypatch.setattr("veneer.kernels.cross_entropy.GPU_CHUNK_BYTES", 2 * vocabulary * 50)
    monkeypatch.setattr("veneer.kernels.cross_entropy.FEWEST_ROWS", 50)
    torch.manual_seed(0)
    hidden, weight = torch.randn(123, 64, device="cuda"), torch.randn(vocabulary, 64, device="cuda") / 8
    targets = torch.randint(0, vocabulary, (123,), device="cuda")
    targets[::7] = -100

    def run(impl, dtype):
        h = hidden.to(dtype).requires_grad_()
        options = {"softcap": softcap, "logit_scale": scale, "impl": impl}
        loss = dispatch.linear_cross_entropy(h, weight.to(dtype), None, targets, **options)
        loss.backward()
        return loss.detach().double(), h.grad.double()

    fast, naive, truth = run("fast", torch.bfloat16), run("reference", torch.bfloat16), run("reference", torch.float64)
    for f, n, t in zip(fast, naive, truth):
        size = t.abs().max()
        assert (f - t).abs().max() / size <= (n - t).abs().max() / size + 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", gated.ACTIVATIONS)
@pytest.mark.parametrize("width", [1024, 1531])
def test_the_gated_activations_kernel(kind, dtype, width):
    """Against the twin in float64, with inputs that are columns of wider buffers and h written over ∂L/∂h."""
    torch.manual_seed(0)
    big = (3 * torch.randn(77, 3 * width + 7, device="cuda")).to(dtype)
    gate, up, grad = big[:, 1 : 1 + width], big[:, 3 + width : 3 + 2 * width], big[:, 5 + 2 * width : 5 + 3 * width]
    rest = big[:, : 5 + 2 * width].clone()
    h = grad.double()
    wanted = gated.gated_backward_plain(gate.double(), up.double(), h, 16, kind)
    wide = torch.ops.veneer.gated_backward(gate, up, grad, 16, kind)
    assert wide.shape == (77, 2 * width + 16) and torch.equal(big[:, : 5 + 2 * width], rest)
    bound = 1e-5 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    for found, exact in ((wide[:, : 2 * width], wanted[:, : 2 * width]), (grad, h)):
        assert ((found.double() - exact).abs() <= bound * exact.abs() + 2e-6).all()


def gradients(dtype, length=96, hidden_act="silu", **options):
    model = tiny_llama(num_hidden_layers=4, hidden_act=hidden_act, **GPU_SIZES).to("cuda", dtype).train()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=8), seed=0)
    torch.manual_seed(1)
    for p in bank.parameters("default").values():
        p.data.copy_(0.1 * torch.randn(p.shape))
    ids = torch.randint(0, 400, (2, length), generator=torch.Generator().manual_seed(2)).cuda()
    with Accelerated(model, note=pytest.fail, **options) as fast:
        for _ in range(2):
            model.zero_grad()
            fast.start()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
    torch.cuda.synchronize()
    return float(loss.detach()), {k: p.grad.double().cpu() for k, p in bank.parameters("default").items()}


@pytest.mark.parametrize("modes", ["keep", "selective", "recompute", "mixed"])
def test_compiled_blocks_on_every_setting_of_the_dial(modes, monkeypatch):
    monkeypatch.setattr("veneer.training.store.SMALL", 1)
    truth = gradients(torch.float32, compile=False)
    naive, fast = gradients(torch.bfloat16, compile=False), gradients(torch.bfloat16, modes=modes, dynamic=False)
    assert fast[0] == pytest.approx(truth[0], rel=2e-2)
    for key, wanted in truth[1].items():
        scale = wanted.abs().max().clamp_min(1e-12)
        error, allowed = ((g[1][key] - wanted).abs().max() / scale for g in (fast, naive))
        assert error <= 2 * allowed + 16 * torch.finfo(torch.bfloat16).eps, (key, float(error), float(allowed))


@pytest.mark.parametrize("hidden_act", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("modes", ["keep", "selective", "recompute"])
def test_compiled_blocks_with_a_gated_mlp_of_odd_lengths(modes, hidden_act):
    shape = {"length": 61, "hidden_act": hidden_act}
    truth = gradients(torch.float32, compile=False, **shape)
    naive = gradients(torch.bfloat16, compile=False, **shape)
    for dtype in (torch.bfloat16, torch.float32):
        fast = gradients(dtype, modes=modes, **shape)
        for key, wanted in truth[1].items():
            scale = wanted.abs().max().clamp_min(1e-12)
            error, allowed = ((g[1][key] - wanted).abs().max() / scale for g in (fast, naive))
            limit = 2 * allowed + 16 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2e-3
            assert error <= limit, (key, dtype, float(error), float(allowed))


@pytest.mark.parametrize("modes", ["recompute", "recompute-offload", "offload"])
def test_the_dial_without_the_compiler_changes_no_gradient(modes, monkeypatch):
    monkeypatch.setattr("veneer.training.store.SMALL", 1)
    kept, found = gradients(torch.float32, compile=False), gradients(torch.float32, compile=False, modes=modes)
    for key, wanted in kept[1].items():
        torch.testing.assert_close(found[1][key], wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit", "paged-adamw"])
def test_optimisers_learn_and_go_on_where_they_were(kind):
    if kind != "adamw":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, goal = torch.randn(64, 4096), torch.randn(64, 4096, device="cuda")

    def make():
        p = torch.nn.Parameter(start.cuda())
        return p, FlatOptimizer({"w.lora_A": p}, OptimConfig(lr=1e-1, optimizer=kind))

    def step(p, optimizer):
        optimizer.zero_grad()
        loss = (p - goal).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    p, optimizer = make()
    losses = [step(p, optimizer) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]
    q, again = make()
    q.data.copy_(p.data)
    again.load_state(optimizer.state())
    for _ in range(3):
        step(p, optimizer), step(q, again)
    torch.testing.assert_close(p, q)

"""Packed groups and captured rows on an NVIDIA GPU, against the plain path and float32 truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import veneer
from conftest import GPU_SIZES, tiny_llama
from veneer.data.example import TokenizedExample
from veneer.training.accelerate import Accelerated
from veneer.training.flat import FlatOptimizer
from veneer.training.forward import RowModel
from veneer.training.graphs import RowGraphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
SIZES = GPU_SIZES | {"num_hidden_layers": 3}


def examples(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [TokenizedExample(random.integers(1, 60, n).astype(np.int32), random.random(n) < 0.7) for n in lengths]


def run(
    dtype, compile, graphs, mode="keep", nf4=False, batches=((40, 33, 90), (40, 33, 90), (61, 20, 50), (30, 33, 90))
):
    """Gradients of a few rows, one after the other, and how many graphs were captured."""
    model = tiny_llama(**SIZES).to("cuda", dtype).train()
    if nf4:
        quantise(model)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=5, alpha=7), seed=0)
    torch.manual_seed(1)
    parameters = bank.parameters("default")
    for p in parameters.values():
        p.data.normal_().mul_(0.1)
    config = veneer.OptimConfig(micro_batch_tokens=256, cuda_graphs="auto" if graphs else "off")
    optimizer, rows = FlatOptimizer(parameters, config), RowModel(model)
    fast, notes, found = Accelerated(model, modes=mode, compile=compile, note=print), [], []
    rounds = RowGraphs(rows, fast, config, notes.append)
    with rows.attention(), fast:
        for seed, lengths in enumerate(batches):
            optimizer.zero_grad()
            for row in rows.pack(examples(*lengths, seed=seed), 256, False):
                fast.start()
                rounds.backward(row, 0.01)
            found.append([g.grad.clone() for g in optimizer.buffers])
    assert not notes
    return [torch.cat(grads) for grads in found], len(rounds.graphs)


def quantise(model):
    import bitsandbytes as bnb

    for name, linear in list(model.model.named_modules()):
        if type(linear) is torch.nn.Linear:
            new = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype,
                compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            parent, _, leaf = name.rpartition(".")
            setattr(model.model.get_submodule(parent), leaf, new.to("cuda"))


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
def test_captured_rows_have_the_gradients_of_plain_ones(mode, nf4, compile):
    if nf4:
        pytest.importorskip("bitsandbytes")
    plain, none = run(torch.bfloat16, compile, False, mode, nf4)
    captured, count = run(torch.bfloat16, compile, True, mode, nf4)
    assert none == 0 and count >= 1
    for a, b in zip(captured, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * float(b.abs().max()))


@pytest.mark.parametrize("mode", ["keep", "selective", "recompute", "recompute-offload"])
@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
def test_packed_blocks_are_as_good_as_plain_ones(mode, nf4):
    if nf4:
        pytest.importorskip("bitsandbytes")
    exact, _ = run(torch.float32, False, False, nf4=nf4)
    plain, _ = run(torch.bfloat16, False, False, nf4=nf4)
    packed, _ = run(torch.bfloat16, True, True, mode=mode, nf4=nf4)
    for p, n, e in zip(packed, plain, exact, strict=True):
        error, allowed = (p - e).norm() / e.norm(), (n - e).norm() / e.norm()
        assert error <= 1.5 * allowed + 0.01, (float(error), float(allowed))


def test_the_triton_kernels_do_what_their_twins_do():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    from veneer.kernels.scaled_copies import ScaledCopies
    from veneer.kernels.unpack import unpack, unpack_plain

    torch.manual_seed(0)
    for nested in (True, False):
        made = [
            functional.quantize_4bit(torch.randn(n, 192, device="cuda"), compress_statistics=nested, quant_type="nf4")
            for n in (36, 20)
        ]
        states, empty = [s for _, s in made], torch.empty(0, device="cuda")
        lists = [
            [p.view(-1) for p, _ in made],
            [s.absmax for s in states],
            [s.state2.absmax if nested else empty for s in states],
            [s.offset.reshape(1) if nested else empty for s in states],
        ]
        side, bottom = torch.randn(56, 5, device="cuda"), torch.randn(5, 192, device="cuda")
        shared = [side, bottom, states[0].code, states[0].state2.code if nested else empty]
        fast, plain = (
            unpack([*shared, *(t for part in lists for t in part)], False),
            unpack_plain(*shared, *lists, False),
        )
        torch.testing.assert_close(fast[:56], plain[:56], rtol=1e-6, atol=1e-6)
        assert torch.equal(fast[56:, :192], bottom)
    big = torch.zeros(90, 40, device="cuda", dtype=torch.bfloat16)
    sources, targets = (
        [torch.randn(50, 33, device="cuda"), torch.randn(3, 4, device="cuda")],
        [big[:50, 2:35], big[60:63, 5:9]],
    )
    copies = ScaledCopies()
    for _ in range(2):
        copies.run(sources, targets, [1.0, 0.5])
        assert all(torch.equal(t, (s * f).bfloat16()) for s, t, f in zip(sources, targets, (1.0, 0.5)))
        sources[0].add_(1)

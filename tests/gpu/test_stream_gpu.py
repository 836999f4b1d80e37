"""Streaming on an NVIDIA GPU: pinned copies on a stream of their own, compiled blocks, and less memory than the model."""

import pytest
import torch

import veneer
from conftest import GPU_SIZES, tiny_llama
from veneer.base.load import load_base
from veneer.base.stream_load import load_streamed
from veneer.data.example import TokenizedExample
from veneer.training.accelerate import Accelerated
from veneer.training.flat import FlatOptimizer
from veneer.training.forward import RowModel
from veneer.training.streamed import StreamedRows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("base")
    tiny_llama(num_hidden_layers=7, **GPU_SIZES).bfloat16().save_pretrained(path)  # the same weights in every dtype
    tokenizer.save_pretrained(path)
    return path


def step(model, dial, compile):
    import numpy as np

    bank = veneer.attach(model, veneer.AdapterConfig(rank=8), seed=0)
    streamed = hasattr(model, "veneer_stream")
    if streamed:
        model.veneer_stream.settle()
    torch.manual_seed(1)
    parameters = bank.parameters("default")
    for parameter in parameters.values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape).to(parameter))
    model.train()
    optimizer = FlatOptimizer(parameters, veneer.OptimConfig())
    rows = StreamedRows(model, modes=dial, compile=compile) if streamed else RowModel(model)
    fast = rows if streamed else Accelerated(model, modes=dial, compile=compile)
    random = np.random.default_rng(0)
    data = [TokenizedExample(random.integers(1, 400, n).astype(np.int32), np.ones(n, bool)) for n in (90, 33, 70, 128)]
    packed = rows.pack(data, 128, True)
    found = []
    with rows.attention(), fast:
        for _ in range(2):  # the second time, what was left of the first is in the buffers
            optimizer.zero_grad()
            if streamed:
                losses = rows.backward(packed, 300)
            else:
                losses = []
                for row in packed:
                    fast.start()
                    with rows.row(row) as loss:
                        (loss / 300).backward()
                    losses.append(loss.detach())
            found.append((torch.stack(losses), [b.grad.clone() for b in optimizer.buffers]))
        if streamed:
            assert bool(rows.fast.store.host.free) == (dial != "recompute")  # "cuda" names the tensors' own device
            if compile:
                assert all(part.packed for block in rows.blocks for part in block.modules() if hasattr(part, "packed"))
    return found


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_long_rows_in_chunks_have_the_gradients_of_compiled_blocks(folder, quant, monkeypatch):
    if quant == "nf4":
        pytest.importorskip("bitsandbytes")
    options = {"device": "cuda", "dtype": "float32", "quant": quant}
    wanted = step(load_streamed(folder, **options)[0], "recompute", True)
    monkeypatch.setattr("veneer.training.streamed.LONG", 100)
    monkeypatch.setattr("veneer.training.chunks.CHUNK", 48)
    found = step(load_streamed(folder, **options)[0], "recompute", True)
    for (loss, grads), (true_loss, true_grads) in zip(found, wanted, strict=True):
        torch.testing.assert_close(loss, true_loss, rtol=1e-4, atol=0)
        for grad, true in zip(grads, true_grads, strict=True):
            assert (grad - true).norm() <= 1e-3 * true.norm()


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("compile", [False, True])
def test_blocks_that_stay_on_the_device_change_nothing(folder, quant, compile):
    if quant == "nf4":
        pytest.importorskip("bitsandbytes")
    options = {"device": "cuda", "dtype": "float32", "quant": quant}
    wanted = step(load_streamed(folder, **options)[0], "recompute", compile)
    for where, resident in (("host", 1), ("disk", 4), ("host", 7)):
        found = step(load_streamed(folder, where=where, resident=resident, **options)[0], "recompute", compile)
        for (loss, grads), (true_loss, true_grads) in zip(found, wanted, strict=True):
            torch.testing.assert_close(loss, true_loss, rtol=1e-5, atol=0)
            for grad, true in zip(grads, true_grads, strict=True):
                assert (grad - true).norm() <= 1e-4 * true.norm()


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(("dial", "compile"), [("recompute", False), ("recompute-offload", True), ("mixed", True)])
def test_gradients_are_the_resident_bases(folder, where, quant, dial, compile, monkeypatch):
    if quant == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("veneer.training.store.SMALL", 1)
    options = {"device": "cuda", "quant": quant}
    truth = step(load_base(folder, dtype="float32", **options)[0], dial, False)
    resident = step(load_base(folder, dtype="bfloat16", **options)[0], dial, compile)
    found = step(load_streamed(folder, where=where, dtype="bfloat16", **options)[0], dial, compile)
    for (loss, grads), (plain_loss, plain), (true_loss, true) in zip(found, resident, truth, strict=True):
        torch.testing.assert_close(loss, plain_loss, rtol=2e-3, atol=0)  # the plain head, but in other chunks
        assert (loss - true_loss).norm() <= 1.5 * (plain_loss - true_loss).norm() + 1e-3 * true_loss.norm()
        for grad, rounded, exact in zip(grads, plain, true, strict=True):
            assert (grad - exact).norm() <= 1.2 * (rounded - exact).norm() + 1e-3 * exact.norm()


def test_weights_are_pinned_and_memory_is_that_of_two_blocks(folder):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load_streamed(folder, device="cuda", dtype="float32")[0]
    base = model.veneer_stream
    assert all(block.flat.is_pinned() for block in base.conveyor.blocks)
    held = torch.cuda.memory_allocated() - before
    assert held < 3 * base.conveyor.blocks[0].nbytes + sum(b.nbytes for b in base.head.blocks) + (1 << 20)
    ids = torch.arange(1, 40, device="cuda")[None]
    with torch.no_grad():
        resident = load_base(folder, device="cuda", dtype="float32")[0]
        torch.testing.assert_close(model(input_ids=ids).logits, resident(input_ids=ids).logits, rtol=1e-4, atol=1e-4)

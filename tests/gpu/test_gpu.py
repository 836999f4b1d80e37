"""The same behaviour on an NVIDIA GPU: kernels against float32 truth, packed training, exact files."""

import numpy as np
import pytest
import torch

import veneer
from conftest import tiny_llama
from veneer.data.example import TokenizedExample
from veneer.formats.peft import adapter_tensors
from veneer.kernels import dispatch
from veneer.training.forward import RowModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows,d_in,d_out,rank", [(123, 252, 507, 16), (1, 9, 4, 4), (2048, 576, 1536, 8)])
def test_lora_linear_on_the_gpu(dtype, rows, d_in, d_out, rank):
    torch.manual_seed(0)
    x = torch.randn(rows, d_in, device="cuda")
    w = torch.randn(d_out, d_in, device="cuda") / d_in**0.5
    factors = torch.randn(rank, d_in, device="cuda") / d_in**0.5, torch.randn(d_out, rank, device="cuda")
    up = torch.randn(rows, d_out, device="cuda")

    def run(impl, kind):
        inputs = [x.to(kind).requires_grad_(), *(f.clone().requires_grad_() for f in factors)]
        if kind == torch.float64:
            inputs = [t.detach().double().requires_grad_() for t in inputs]
        out = dispatch.lora_linear(inputs[0], w.to(kind), None, inputs[1], inputs[2], 0.7, impl=impl)
        out.backward(up.to(kind))
        return [out.detach(), *(t.grad for t in inputs)]

    fast, naive, truth = run("fast", dtype), run("reference", dtype), run("reference", torch.float64)
    for f, n, t in zip(fast, naive, truth, strict=True):
        scale = t.abs().max()
        error, allowed = (f.double() - t).abs().max() / scale, (n.double() - t).abs().max() / scale
        assert error <= allowed + 4 * torch.finfo(dtype).eps, (float(error), float(allowed))


def examples():
    rng = np.random.default_rng(0)
    start = rng.integers(1, 400, 20)
    return [
        TokenizedExample(
            np.concatenate([start, rng.integers(1, 400, n)]).astype(np.int32), np.arange(20 + n) >= 20 + n // 2
        )
        for n in (5, 9, 14, 30)
    ]


def test_packed_training_on_the_gpu_matches_the_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        model = tiny_llama().to(device)
        bank = veneer.attach(model, veneer.AdapterConfig(rank=4), seed=0)
        for p in bank.parameters("default").values():
            p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
        rows = RowModel(model)
        rows.check(examples())
        assert rows.packing and rows.fast_head, rows.notes
        with rows.attention():
            for row in rows.pack(examples(), 1000, True):
                with rows.row(row) as loss:
                    loss.backward()
        found[device] = float(loss.detach()), {n: p.grad.cpu() for n, p in bank.parameters("default").items()}
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    for name, grad in found["cpu"][1].items():
        torch.testing.assert_close(found["cuda"][1][name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


def test_train_and_resume_on_the_gpu(model_dir, chat_file, tmp_path):
    def config(out, **train):
        options = {
            "batch_size": 4,
            "epochs": 2,
            "save_every": 2,
            "lr": 5e-3,
            "checkpointing": True,
            "compile": "off",
        } | train
        return veneer.TrainConfig(
            model=str(model_dir), data=str(chat_file), out=str(tmp_path / out), adapter={"rank": 4}, train=options,
            device="cuda", dtype="bfloat16",
        )  # fmt: skip

    result = veneer.train(config("run"))
    assert result.stopped == "finished"
    again = veneer.train(config("run"), resume=True)
    assert again.steps == result.steps
    model, _ = veneer.load_base(model_dir, device="cuda")
    bank = veneer.load_adapter(model, result.adapter)
    assert all(t.isfinite().all() for t in adapter_tensors(bank, "default").values())
    answer = veneer.generate(model, _, [[{"role": "user", "content": "hello"}]], max_new_tokens=4)
    assert answer[0].tokens <= 4


def test_rows_of_a_table_in_pinned_host_memory_inside_a_graph():
    from veneer.kernels.host_rows import host_rows

    table = torch.randn(1000, 77).bfloat16().pin_memory()
    ids = torch.tensor([3, 999, 0, 3], device="cuda")
    host_rows(table, ids, torch.float32)  # compiles the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = host_rows(table, ids, torch.float32)
    ids.copy_(torch.tensor([5, 6, 7, 8]))
    graph.replay()
    assert torch.equal(rows.cpu(), table[5:9].float())

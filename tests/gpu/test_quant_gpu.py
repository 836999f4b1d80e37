"""Quantised bases on an NVIDIA GPU, in bfloat16: bitsandbytes, torchao, HQQ."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

import veneer
from conftest import tiny_llama
from veneer.adapter import quantised
from veneer.adapter.frozen import is_quantised, shape_of, weight_of
from veneer.base.load import load_base
from veneer.base.quant import EXTRAS, LIBRARIES, quantised_linear
from veneer.kernels import dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

SIZES = {"nf4": (507, 252), "fp4": (38, 123), "int8": (507, 252), "int8-torchao": (507, 252), "hqq": (40, 128)}
SIZES["int4-torchao"] = (500, 320)


@pytest.fixture(params=sorted(EXTRAS))
def kind(request):
    for library in LIBRARIES[EXTRAS[request.param]]:
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    return request.param


def layer_of(kind, dtype=torch.bfloat16):
    torch.manual_seed(0)
    d_out, d_in = SIZES[kind]
    linear = nn.Linear(d_in, d_out).cuda()
    return linear, quantised_linear(linear, kind, dtype, "cuda")


def test_the_weight_is_what_the_librarys_own_product_uses(kind):
    linear, layer = layer_of(kind)
    d_out, d_in = shape_of(layer)
    assert (d_out, d_in) == SIZES[kind] and is_quantised(layer)
    weight = weight_of(layer).float()
    with torch.no_grad():
        eye = torch.eye(d_in, device="cuda", dtype=torch.bfloat16)
        theirs = (layer(eye) - layer.bias).t().float()
    largest = float(linear.weight.abs().max())
    assert ((theirs - weight).abs().max() / largest) < 0.02, "one rounding of bfloat16, or of int8's input"
    assert 0 < ((weight - linear.weight).abs().max() / largest) < 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lora_over_it_is_right_in_every_gradient(kind, dtype):
    if kind == "int4-torchao" and dtype != torch.bfloat16:
        pytest.skip("torchao's 4-bit tensor is bfloat16")
    _, layer = layer_of(kind, dtype)
    d_out, d_in = shape_of(layer)
    inputs = [torch.randn(2, 61, d_in), torch.randn(8, d_in) / d_in**0.5, torch.randn(d_out, 8), torch.randn(d_out)]
    up, dequantise = torch.randn(2, 61, d_out, device="cuda"), quantised.dequantiser(layer)
    weight = dequantise(dtype)

    def run(impl, compute, get):
        x, lora_A, lora_B, bias = (t.cuda().to(torch.float64 if compute == torch.float64 else t.dtype) for t in inputs)
        leaves = [t.requires_grad_() for t in (x.to(compute), lora_A, lora_B, bias.to(compute))]
        y = dispatch.quantised_lora_linear(leaves[0], get, leaves[3], leaves[1], leaves[2], 0.7, impl=impl)
        y.backward(up.to(compute))
        return [y.detach(), *(t.grad for t in leaves)]

    truth = run("reference", torch.float64, lambda d: weight.double())
    fast, naive = (run(impl, dtype, dequantise) for impl in ("fast", "reference"))
    for f, n, t in zip(fast, naive, truth, strict=True):
        scale = t.abs().max()
        error, allowed = (f.double() - t).abs().max() / scale, (n.double() - t).abs().max() / scale
        assert error <= allowed + 4 * torch.finfo(dtype).eps, (float(error), float(allowed))


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("quant")
    tiny_llama(
        initializer_range=0.2, hidden_size=192, num_attention_heads=6, intermediate_size=320, tie_word_embeddings=False
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_base_loads_trains_and_answers(kind, base_dir, chat_file, tmp_path):
    seen = []
    config = veneer.TrainConfig(
        model=str(base_dir), data=str(chat_file), out=str(tmp_path / "run"), adapter={"rank": 4}, quant=kind,
        train={"batch_size": 4, "epochs": 4, "lr": 5e-3, "checkpointing": True, "compile": "off"},
        device="cuda", dtype="bfloat16",
    )  # fmt: skip
    result = veneer.train(config, observe=seen.append)
    losses = [r["loss"] for r in seen if r["type"] == "train"]
    assert result.stopped == "finished" and losses[-1] < losses[0], losses
    model, tokenizer = load_base(base_dir, quant=kind, device="cuda")
    assert sum(is_quantised(m) for m in model.modules()) == 14 and type(model.lm_head) is nn.Linear
    floats = (model.lm_head.weight, model.model.embed_tokens.weight, model.model.norm.weight)
    assert all(p.dtype == torch.bfloat16 and p.is_cuda for p in floats)
    bank = veneer.load_adapter(model, result.adapter)
    assert all(p.dtype == torch.float32 and p.is_cuda for p in bank.parameters("default").values())
    plain, _ = load_base(base_dir, device="cuda")
    veneer.load_adapter(plain, result.adapter)
    assert veneer.generate(model, tokenizer, [[{"role": "user", "content": "hello"}]], max_new_tokens=4)[0].tokens <= 4


def test_no_float_weight_outlives_the_forward_pass(kind):
    linear, _ = layer_of(kind)
    big = nn.Linear(4096, 4096, bias=False).cuda().bfloat16()
    layer = quantised_linear(big, kind, torch.bfloat16, "cuda")
    model = nn.Sequential(layer)
    veneer.attach(model, veneer.AdapterConfig(rank=8))
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    model(x).sum().backward()  # what the libraries keep for themselves is there now
    del linear, big
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = model(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 4 * 2**20, "the bfloat16 weight alone has 32 MiB"
    y.sum().backward()


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8-torchao"])
def test_merging_on_the_gpu(kind, base_dir, tmp_path):
    if find_spec(LIBRARIES[EXTRAS[kind]][0]) is None:
        pytest.skip("its library is not installed")
    model, _ = load_base(base_dir, quant=kind, device="cuda")
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4))
    for p in bank.parameters("default").values():
        p.data.normal_(0, 0.05)
    adapter = veneer.save_adapter(model, tmp_path / "adapter")
    report = veneer.merge_into_float(adapter, base_dir, tmp_path / "merged", kind, device="cuda", dtype="float32")
    assert report.exact.top1 > 0.98 and report.requantised.mean > 0
    assert any(is_quantised(m) for m in load_base(tmp_path / "merged", device="cuda")[0].modules())

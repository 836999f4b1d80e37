"""Quantised linears of every library: the weight they stand for, and LoRA over it against float64 truth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quant_layers import LOADED, STORED, ExllamaQuantLinear, make_layer, packed_columns
from veneer.adapter import quantised
from veneer.adapter.frozen import is_quantised, shape_of, weight_of
from veneer.kernels import dispatch
from veneer.kernels.dequantise import blockwise4_weight, unpack_rows


def by_identity(layer: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight as the layer's own forward has it."""
    with torch.no_grad():
        y = layer(torch.eye(shape_of(layer)[1], dtype=dtype))
    return (y if layer.bias is None else y - layer.bias).t().float()


@pytest.mark.parametrize("kind", (*LOADED, *STORED))
def test_a_quantised_linear_is_told_and_dequantised_as_its_own_forward_has_it(kind):
    layer = make_layer(kind)
    assert is_quantised(layer) and quantised.method(layer) == {"int8-torchao": "torchao"}.get(kind, kind.split("-")[0])
    weight = weight_of(layer)
    assert tuple(weight.shape) == shape_of(layer) and weight.dtype == torch.float32
    if kind in ("nf4", "fp4"):  # bitsandbytes' own product is wrong for these widths on a CPU: see below
        linear = nn.Linear(*shape_of(layer)[::-1])
        torch.manual_seed(0)
        linear.reset_parameters()
        step = 0.17 if kind == "nf4" else 0.34  # of the largest value of the block
        assert ((weight - linear.weight).abs() <= step * linear.weight.abs().max()).all()
    else:
        tolerance = 0.02 if kind == "int8" else 1e-5  # LLM.int8() rounds its input as well
        torch.testing.assert_close(
            by_identity(layer), weight, rtol=tolerance, atol=tolerance * float(weight.abs().max())
        )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_unpacked_as_bitsandbytes_does_where_it_is_right(kind):
    from bitsandbytes import functional

    torch.manual_seed(0)
    weight = torch.randn(33, 128)
    for nested in (False, True):
        packed, state = functional.quantize_4bit(weight, compress_statistics=nested, quant_type=kind)
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
        mine = blockwise4_weight(packed, state.code, absmax, tuple(state.shape), state.blocksize)
        torch.testing.assert_close(mine, functional.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-6)


def test_bitsandbytes_may_not_repack_a_weight():
    layer = make_layer("nf4")
    quantised.keep_layout(layer)
    before = weight_of(layer), layer.weight.data.clone()
    layer.eval()
    with torch.inference_mode():
        layer(torch.randn(3, 96))
    assert torch.equal(layer.weight.data, before[1]) and torch.equal(weight_of(layer), before[0])


def test_a_layout_that_only_its_kernel_knows_is_asked_for_its_weight():
    torch.manual_seed(0)
    layer = ExllamaQuantLinear(4, in_features=64, out_features=32, group_size=16, bias=True, dtype=torch.float32)
    layer.qweight = layer.qweight.flip(0)
    assert quantised.dequantiser(layer) is None
    torch.testing.assert_close(weight_of(layer), layer.truth, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))
def test_unpacking_inverts_packing(bits, blocks, columns, seed):
    values = torch.randint(0, 2**bits, (32 * blocks, columns), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_rows(packed_columns(values, bits), bits), values.int())


def run(layer, impl, inputs, upstream, truth=None):
    """Output and gradients of (x, A, B, bias)."""
    x, lora_A, lora_B, bias = (t.detach().clone().requires_grad_() for t in inputs)
    dequantise = (lambda dtype: truth) if truth is not None else quantised.dequantiser(layer)
    y = dispatch.quantised_lora_linear(x, dequantise, bias, lora_A, lora_B, 0.7, impl=impl)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), x.grad, lora_A.grad, lora_B.grad, bias.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", (*LOADED, *STORED))
def test_lora_over_a_quantised_linear_is_right_in_every_gradient(kind, dtype):
    layer = make_layer(kind, dtype=dtype)
    d_out, d_in = shape_of(layer)
    torch.manual_seed(1)
    inputs = [torch.randn(2, 3, d_in, dtype=dtype), torch.randn(5, d_in), torch.randn(d_out, 5), torch.randn(d_out)]
    inputs[3] = inputs[3].to(dtype)
    upstream = torch.randn(2, 3, d_out)
    weight = quantised.dequantiser(layer)(dtype).double()
    truth = run(layer, "reference", [t.double() for t in inputs], upstream, weight)
    fast, naive = (run(layer, impl, inputs, upstream) for impl in ("fast", "reference"))
    for f, n, t in zip(fast, naive, truth, strict=True):
        scale = t.abs().max()
        error, allowed = (f.double() - t).abs().max() / scale, (n.double() - t).abs().max() / scale
        assert f.dtype == n.dtype and error <= allowed + 2 * torch.finfo(dtype).eps, (float(error), float(allowed))


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8-torchao", "hqq", "gptq"])
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(kind):
    layer = make_layer(kind)
    d_out, d_in = shape_of(layer)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x, lora_A = torch.randn(3, d_in, requires_grad=True), torch.randn(2, d_in, requires_grad=True)
        lora_B = torch.randn(d_out, 2, requires_grad=True)
        dispatch.quantised_lora_linear(x, quantised.dequantiser(layer), None, lora_A, lora_B, 1.0)
    assert sorted(tuple(t.shape) for t in kept) == sorted([(3, d_in), (2, d_in), (d_out, 2)])

"""Serving on a GPU: kernels against their twins, and captured steps against each adapter alone."""

from __future__ import annotations

import random

import pytest
import torch
from serve.served import Alone, ask, check_growth, engine_of, read, write
from serve.test_grouped import (
    check_neighbours,
    check_pieces,
    check_prompt_update,
    check_update,
    factors,
    loops,
    served_inputs,
)

from conftest import CORPUS, tiny_llama
from veneer.kernels import grouped, served, served_attention
from veneer.kernels.served_check import Shapes, deviation
from veneer.serve import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("uses", [1, 3])
@pytest.mark.parametrize(
    "d_in, d_outs, rank",
    [(252, (507, 64), 16), (4096, (4096, 1024, 1024), 16), (1024, (512,), 64), (14336, (4096,), 16)],
)
def test_shrink_and_expand_are_their_definition_and_their_twins(dtype, d_in, d_outs, rank, uses):
    inputs = served_inputs(dtype, "cuda", rows=64, uses=uses, d_in=d_in, d_outs=d_outs, rank=rank, places=20)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    got = check_update(tolerance, *inputs)
    x, A, B, y, tiles, weights, _ = inputs
    twin = [t.clone() for t in y]
    served.expand_twin(served.shrink_twin(x, A, tiles), B, tiles, weights, twin)
    for mine, other in zip(got, twin):
        assert (mine.float() - other.float()).abs().max() <= tolerance * other.float().abs().max()


@DTYPES
@pytest.mark.parametrize("uses", [1, 2])
def test_a_row_does_not_depend_on_who_shares_its_tile(dtype, uses):
    check_neighbours(*served_inputs(dtype, "cuda", rows=64, uses=uses, d_in=4096, d_outs=(1024, 256, 256)))


@DTYPES
@pytest.mark.parametrize("K, G, D, C", [(2, 3, 6, 130), (8, 4, 128, 2048), (3, 1, 64, 257), (1, 8, 256, 2048)])
@pytest.mark.parametrize("window", [None, 7])
def test_attention_over_slots_is_its_twin(dtype, K, G, D, C, window):
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(4, K, G, D, generator=g, device="cuda").to(dtype)
    keys, values = (torch.randn(5, K, C, D, generator=g, device="cuda").to(dtype) for _ in range(2))
    slots, positions = torch.tensor([3, 0, 4, 1]).cuda(), torch.tensor([0, C - 1, 64, 17]).cuda()
    got = served_attention.attend(q, keys, values, slots, positions, D**-0.5, window)
    twin = served_attention.attend_twin(q, keys, values, slots, positions, D**-0.5, window)
    assert (got.float() - twin.float()).abs().max() <= (1e-4 if dtype == torch.float32 else 2e-2)


@DTYPES
def test_updates_of_prompts_are_their_definition(dtype):
    check_prompt_update(1e-5 if dtype == torch.float32 else 1e-2, dtype, "cuda")


def test_grouped_lora_in_one_product():
    A, B, s = factors([3, 17, 16, 5], 64, 72, torch.bfloat16)
    A, B = ([t.detach().cuda().requires_grad_() for t in part] for part in (A, B))
    x = torch.randn(9, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([2, -1, 0, 2, 0, 3, -1, 2, 3], device="cuda")
    if not grouped._grouped_mm_takes(x):
        pytest.skip("this torch has no grouped_mm")
    out, truth = grouped.grouped_lora(x, A, B, s, rows), loops(x, A, B, s, rows)
    assert (out - truth).abs().max() <= 3e-2 * truth.abs().max()
    used = [x, *A[:1], *A[2:], *B[:1], *B[2:]]
    for mine, true in zip(torch.autograd.grad(out.float().sum(), used), torch.autograd.grad(truth.sum(), used)):
        assert (mine.float() - true.float()).abs().max() <= 5e-2 * true.float().abs().max()


def test_captured_steps_answer_as_each_adapter_alone(tokenizer, tmp_path):
    for name, seed, rank, targets in (("a", 1, 3, "qv"), ("b", 2, 8, "all"), ("c", 3, 5, "mlp")):
        write(tmp_path / name, seed, rank=rank, targets=targets)
    alone = Alone(tokenizer, {name: tmp_path / name for name in "abc"}, tiny_llama().cuda())
    engine, _ = engine_of(
        tokenizer, tmp_path, tiny_llama().cuda(), adapters="abc", registry={"device_slots": 2, "host_slots": 1}, slots=9
    )
    rng, asked = random.Random(0), []
    stacks = [(), (("a", 1.0),), (("b", 1.0),), (("c", 1.0),), (("a", 0.7), ("b", -0.3))]
    for _ in range(40):
        text, stack, new = rng.choice(CORPUS)[: rng.randrange(4, 60)], rng.choice(stacks), rng.randrange(1, 25)
        asked.append((stack, text, new, ask(engine, text, new, stack)))
    for stack, text, new, ticket in asked:
        assert read(ticket) == alone(stack, text, new)
    assert len(engine.runner.captures) == 2 and any(
        room and step.graph for (*_, room), step in engine.runner.steps.items()
    )
    engine.shutdown(5)


def test_captured_passes_follow_a_pool_that_grows_and_goes(tokenizer, tmp_path):
    check_growth(tokenizer, tmp_path, lambda: tiny_llama().cuda(), Engine)


def test_rows_without_an_adapter_are_bit_equal_to_the_base(tokenizer, tmp_path):
    write(tmp_path / "a", 1)
    engine, _ = engine_of(tokenizer, tmp_path, tiny_llama().cuda().bfloat16(), adapters="a", slots=4)
    read(ask(engine, "warm", 2, [("a", 1.0)]))
    rows = [(0, 5, 7, ()), (1, 5, 8, ((0, 1.0),)), (2, 5, 9, ())]
    mixed = engine.runner.tokens(rows).clone()
    plain = engine.runner.tokens([(slot, at, token, ()) for slot, at, token, _ in rows]).clone()
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]]) and not torch.equal(mixed[1], plain[1])
    engine.shutdown(5)


def test_captured_prompts_without_an_adapter_are_bit_equal_to_the_base(tokenizer, tmp_path):
    write(tmp_path / "a", 1)
    engine, _ = engine_of(tokenizer, tmp_path, tiny_llama().cuda().bfloat16(), adapters="a", slots=4)
    read(ask(engine, "warm", 2, [("a", 1.0)]))
    pieces = [(0, 0, list(range(1, 90)), ()), (1, 0, list(range(5, 40)), ((0, 1.0),)), (2, 0, [9, 8, 7], ())]
    mixed = engine.runner.prompts(pieces, [True] * 3).clone()
    plain = engine.runner.prompts([(*piece[:3], ()) for piece in pieces], [True] * 3)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]]) and not torch.equal(mixed[1], plain[1])
    engine.shutdown(5)


# Last, and wide heads last of all: a kernel that reads where it must not takes the process's CUDA context along.


@DTYPES
@pytest.mark.parametrize("K, G, D, C", [(2, 3, 12, 162), (8, 4, 128, 2048), (3, 2, 160, 300), (1, 8, 256, 300)])
@pytest.mark.parametrize("window", [None, 9])
def test_attention_of_prompts_is_its_definition(dtype, K, G, D, C, window):
    check_pieces(1e-4 if dtype == torch.float32 else 2e-2, dtype, "cuda", K, G, D, C, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(2, 4, 64), (1, 5, 80), (2, 7, 96), (2, 4, 128), (1, 3, 256)])
def test_a_server_trusts_this_gpu_for_models_of_many_shapes(dtype, heads):
    linears = ((2048, (512, 2048, 5632)), (5632, (2048,))) if heads[2] == 64 else ()
    shapes = Shapes(linears, heads, windows=(None, 1, 64, 300))
    assert deviation(torch.device("cuda"), dtype, shapes) <= (1e-4 if dtype == torch.float32 else 2e-2)

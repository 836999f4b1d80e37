"""Compiled blocks of a streamed base: packed as they arrive, 4-bit ones unpacked once; long rows in chunks."""

from __future__ import annotations

import pytest
import torch
from streamed_steps import EXAMPLES, WIDE, close, examples, same, save, step
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import veneer
from conftest import tiny_llama
from veneer.base.load import load_base
from veneer.base.stream_load import load_streamed
from veneer.kernels.unpack import unpack_rows
from veneer.training.packing import PackedGroup

ONE_ROW = {"data": EXAMPLES[3:], "dynamic": False}  # of one length: traced once, without symbols for its shapes


@pytest.fixture
def traced(monkeypatch):
    """The names of what each compiled graph calls; traced, without the C++ compiler."""
    found = []

    def compile_fx(graph, inputs):
        found.append([getattr(node.target, "__name__", "") for node in graph.graph.nodes])
        return aot_eager(graph, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch._dynamo.reset()
    return found


def test_compiled_blocks_are_packed_as_they_arrive(tmp_path, tokenizer, traced):
    """From a bfloat16 file, cast on the way; the factors change from step to step."""
    folder, config = save(tiny_llama(num_hidden_layers=3).bfloat16(), tmp_path, tokenizer), veneer.AdapterConfig(rank=4)
    options = {"device": "cpu", "dtype": "float32"}
    wanted = step(load_base(folder, **options)[0], config, steps=2, **ONE_ROW)
    streamed = load_streamed(folder, where="disk", **options)[0]
    before = streamed.veneer_stream.conveyor.nbytes
    close(step(streamed, config, compile=True, modes="recompute-offload", steps=2, **ONE_ROW), wanted)
    assert {(names.count("lora_group"), names.count("gated_mlp")) for names in traced} == {
        (2, 1)
    }  # q, k, v; o; the rest
    assert streamed.veneer_stream.conveyor.nbytes == before  # as it was
    assert not any(getattr(part, "packed", None) for part in streamed.modules())


def test_compiled_4_bit_blocks_are_unpacked_once_as_they_arrive(tmp_path, tokenizer, traced, monkeypatch):
    """For all rows and for their backward pass; with the very gradients of a resident base, which unpacks for each."""
    unpacked, layers, rows = [], 3 * 7, {"data": examples((40, 40)), "dynamic": False}
    monkeypatch.setattr(
        "veneer.training.arriving.unpack_rows", lambda *args: (unpacked.append(args[0]), unpack_rows(*args))[1]
    )
    folder, config = save(tiny_llama(**WIDE), tmp_path, tokenizer), veneer.AdapterConfig(rank=4)
    wanted = step(load_base(folder, device="cpu", quant="nf4")[0], config, compile=True, **rows)
    streamed = load_streamed(folder, device="cpu", quant="nf4")[0]
    conveyor = streamed.veneer_stream.conveyor
    before = conveyor.nbytes
    same(step(streamed, config, compile=True, **rows), wanted)
    assert len(unpacked) == 4 * layers  # while packing, forward, backward, an evaluation; never for a row
    assert conveyor.nbytes == before
    assert [type(part).__name__ for part in streamed.modules()].count("Linear4bit") == layers  # as it was


def test_blocks_of_two_makes(tmp_path, tokenizer, traced):
    """What is packed in the first block may not be there in others, which have experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=420, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_experts=2,
        num_experts_per_tok=1, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)  # fmt: skip
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, mlp_only_layers=[0]))
    folder, config = save(model, tmp_path, tokenizer), veneer.AdapterConfig(rank=4)
    wanted = step(load_base(folder, device="cpu", quant="nf4")[0], config, **ONE_ROW)
    close(step(load_streamed(folder, device="cpu", quant="nf4")[0], config, compile=True, **ONE_ROW), wanted)


def test_too_little_memory_to_pack_leaves_the_base_as_it_was(tmp_path, tokenizer, monkeypatch):
    """So that a run can go on with another setting."""
    folder = save(tiny_llama(**WIDE), tmp_path, tokenizer)
    made, old = [], PackedGroup

    def failing(*args):
        if len(made) == 5:  # in the second block
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(old(*args))
        return made[-1]

    monkeypatch.setattr("veneer.training.arriving.PackedGroup", failing)
    streamed = load_streamed(folder, device="cpu", quant="nf4")[0]
    conveyor = streamed.veneer_stream.conveyor
    before = conveyor.nbytes
    with pytest.raises(torch.OutOfMemoryError):
        step(streamed, veneer.AdapterConfig(rank=4), compile=True, **ONE_ROW)
    assert made and conveyor.nbytes == before and not conveyor.spots
    assert not any(getattr(part, "packed", None) for part in streamed.modules())
    assert [type(part).__name__ for part in streamed.modules()].count("Linear4bit") == 3 * 7
    with torch.no_grad():
        streamed(torch.arange(5)[None])


def test_packed_and_other_4_bit_linears_in_one_block(tmp_path, tokenizer, traced):
    """Linears without an adapter stay as they are and are moved beside the matrices."""
    folder, config = (
        save(tiny_llama(**WIDE), tmp_path, tokenizer),
        veneer.AdapterConfig(rank=4, target_modules=["v_proj"]),
    )
    wanted = step(load_base(folder, device="cpu", quant="nf4")[0], config, **ONE_ROW)
    close(step(load_streamed(folder, device="cpu", quant="nf4")[0], config, compile=True, **ONE_ROW), wanted)


@pytest.mark.parametrize(("quant", "compile"), [(None, False), ("nf4", False), ("fp4", True)])
def test_long_rows_go_through_mlps_in_chunks(tmp_path, tokenizer, quant, compile, monkeypatch, traced):
    """With `compile` the others are compiled and all are unpacked as they arrive, two of three blocks from the device."""
    monkeypatch.setattr("veneer.training.store.SMALL", 1)
    monkeypatch.setattr("veneer.training.streamed.LONG", 35)  # of the rows of 33, 33 and 40 tokens the last
    monkeypatch.setattr("veneer.training.chunks.CHUNK", 16)
    sizes = []
    monkeypatch.setattr(
        "veneer.training.chunks.checkpoint",
        lambda f, x, **more: (sizes.append(x.shape[1]), checkpoint(f, x, **more))[1],
    )
    model = tiny_llama(**WIDE)
    folder, config = save(model, tmp_path, tokenizer), veneer.AdapterConfig(rank=4)
    rows = {"data": examples((33, 33, 40)), "dynamic": False}
    wanted = step(load_base(folder, device="cpu", quant=quant)[0], config, **rows)
    more = {"where": "disk", "resident": 2} if compile else {}
    streamed = load_streamed(folder, device="cpu", quant=quant, **more)[0]
    found = step(streamed, config, modes="recompute-offload", compile=compile, **rows)
    assert set(sizes) == {16, 8}
    torch.testing.assert_close(torch.stack(found[0]), torch.stack(wanted[0]), rtol=1e-6, atol=0)
    for name, grad in wanted[1].items():
        assert (found[1][name] - grad).norm() <= (1e-3 if compile else 1e-5) * grad.norm() + 1e-12, name

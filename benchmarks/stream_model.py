"""Models of real shapes with random weights on the host, for `bench_stream.py`: one block is made, the others are copies.

The copies have memory of their own, so a step reads as much of the host's memory as with a real model.
"""

from __future__ import annotations

import copy

LLAMA = dict(rope_theta=500000.0, max_position_embeddings=131072, vocab_size=128256, tie_word_embeddings=False,
             num_key_value_heads=8, model_type="llama")  # fmt: skip
SHAPES = {
    "8B": LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70B": LLAMA | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "30B-A3B": dict(model_type="qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
                    num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, intermediate_size=6144,
                    num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, vocab_size=151936,
                    tie_word_embeddings=False, max_position_embeddings=40960),
    "tiny": LLAMA | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=512),
    "tiny-moe": dict(model_type="qwen3_moe", hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, moe_intermediate_size=32, num_experts=4,
                     num_experts_per_tok=2, vocab_size=512, tie_word_embeddings=False),
}  # fmt: skip


def host_model(shape: dict, quant: str | None, device, dtype):
    """(model, blocks' modules, blocks, head) with random weights on the host; one block is made and copied."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from veneer.base.held import hold, leaves_of
    from veneer.base.stream import frozen_blocks
    from veneer.base.stream_load import Files, fill_buffers, head_blocks, quantise_block

    values = dict(shape)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    fill_buffers(model)
    modules = frozen_blocks(model)
    torch.manual_seed(0)
    randomise(modules[0], device)
    if quant:
        quantise_block(modules[0], quant, dtype, device)
    blocks = [hold(leaves_of(modules[0], dtype), device)]
    source = blocks[0].flat.to(device)
    parent = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and m[0] is modules[0])
    for i in range(1, len(modules)):
        parent[i] = modules[i] = copy_of(modules[0], i)
        blocks.append(held_copy(blocks[0], modules[0], modules[i], source, device))
    del source
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        randomise(part, device)
        hold(leaves_of(part, dtype), device)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(owner), leaf, torch.nn.Parameter(torch.ones_like(parameter, device=device), False)
            )
    return model, modules, blocks, head_blocks(model, Files(None, {}), dtype)


def randomise(module, device) -> None:
    """Random matrices and unit vectors on a device."""
    import torch

    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1)
    torch.cuda.empty_cache()


def copy_of(module, index: int):
    """A module of the same structure, without its frozen tensors' memory."""
    import torch

    from veneer.base.held import places

    held = [(place, place.get()) for place in places(module)]
    for place, tensor in held:
        place.put(torch.empty(0, dtype=tensor.dtype))
    twin = copy.deepcopy(module)
    for place, tensor in held:
        place.put(tensor)
    for part in twin.modules():
        if hasattr(part, "layer_idx"):
            part.layer_idx = index
        if hasattr(part, "quant_state"):
            part.quant_state = part.weight.quant_state
    return twin


def held_copy(block, module, twin, source, device):
    """A `Block` for `twin`, whose bytes are a copy of `source` in host memory of their own."""
    from veneer.base.held import Block, Leaf, host_buffer, places, view_of

    new = {(id(a.owner), a.name): b for a, b in zip(places(module), places(twin), strict=True)}
    leaves = [Leaf([new[id(p.owner), p.name] for p in leaf.places], leaf.home, leaf.dtype) for leaf in block.leaves]
    made = Block(leaves)
    made.flat = host_buffer(made.nbytes, device)
    made.flat.copy_(source)
    for leaf in leaves:
        leaf.home = view_of(made.flat, leaf.offset, leaf.home, leaf.dtype)
    made.put_home()
    return made

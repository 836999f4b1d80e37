"""A plan's arithmetic against what real tiny models hold and keep, and what it promises of a budget."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from conformance.models import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

import veneer
from veneer.base.quant import quantise
from veneer.config import AdapterConfig, OptimConfig, parse_size
from veneer.errors import BaseModelError, ConfigError, PlanError
from veneer.plan import bytes as size
from veneer.plan import constants
from veneer.plan.devices import CARDS, CPU
from veneer.plan.fit import AXES, SAME, Budget, Wish, describe, find, options, ranked
from veneer.plan.here import machine
from veneer.plan.profile import profile
from veneer.plan.roofline import step
from veneer.training.bench import veneer_step

BY_NAME = {a.name: a for a in ARCHITECTURES}
SHAPE = dict(vocab_size=301, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes, architectures=["LlamaForCausalLM"])).requires_grad_(False)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """`planned(rank=…, layers=…)`: the profile of the tiny Llama from its config.json."""
    made = {}

    def make(rank=4, layers=3, rows="split", dtype="float32", tied=False):
        key = rank, layers, rows, dtype, tied
        if key not in made:
            folder = tmp_path_factory.mktemp("config")
            llama(num_hidden_layers=layers, tie_word_embeddings=tied).config.save_pretrained(folder)
            made[key] = profile(folder, AdapterConfig(rank=rank), dtype=dtype, rows=rows)
        return made[key]

    return make


def held_bytes(model):
    every = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            every[id(p)] = p.numel() * p.element_size()
            state = getattr(p, "quant_state", None)
            if state is not None:
                parts = [state.absmax, state.state2.absmax]
                every[id(p)] += sum(t.numel() * t.element_size() for t in parts)
        every |= {id(b): b.numel() * b.element_size() for b in module.buffers(recurse=False)}
    return sum(every.values())


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_a_real_model(quant, tied, tmp_path):
    if quant != "none":
        pytest.importorskip("bitsandbytes")
    model = llama(tie_word_embeddings=tied, hidden_size=64, intermediate_size=128)
    model.config.save_pretrained(tmp_path)
    said = profile(tmp_path, AdapterConfig(rank=4), dtype="float32")
    assert said.numbers == sum(p.numel() for p in {id(p): p for p in [*model.parameters(), *model.buffers()]}.values())
    setting = size.Setting(quant, "keep", 64, 64, 64)
    if quant != "none":
        quantise(model, quant, torch.float32, "cpu")
    real = held_bytes(model)
    if quant == "int8":  # a float32 for each row, which `packed` takes as one for 4096 numbers
        assert size.base_bytes(said, setting) == pytest.approx(real, rel=0.02)
    else:
        assert abs(size.base_bytes(said, setting) - real) <= 8 * len(said.blocks) * len(said.blocks[0].linears)


def test_the_adapter_is_that_of_a_real_model(planned):
    model = llama()
    bank = veneer.attach(model, AdapterConfig(rank=4))
    tensors = bank.parameters("default").values()
    said = planned()
    assert said.adapter_bytes == said.trained_bytes == sum(p.numel() * p.element_size() for p in tensors)
    assert said.trained == sum(p.numel() for p in tensors)


def saved_bytes(dial, tokens):
    """What autograd saves in a real step: bytes of distinct storages that are not the model's."""
    model, found = llama(), {}
    train = OptimConfig(checkpointing=dial, compile="off", micro_batch_tokens=max(16, tokens))
    with ExitStack() as stack:
        take, _ = veneer_step(model, AdapterConfig(rank=4), train, [tokens], stack)
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        held = []

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.is_floating_point():
                held.append(tensor)  # so that no address is used twice
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        backward = torch.Tensor.backward
        with saved_tensors_hooks(pack, lambda tensor: tensor), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", lambda loss: (held.append(sum(found.values())), backward(loss)))
            take()
    return next(x for x in held if isinstance(x, int))


@pytest.mark.parametrize("dial", ["keep", "recompute"])
@pytest.mark.parametrize("tokens", [37, 150])
def test_kept_activations_are_what_autograd_saves(planned, dial, tokens):
    said, real = planned(), saved_bytes(dial, tokens)
    kept = sum(size.kept_bytes(block, dial, tokens, False)[0] for block in said.blocks)
    # Before the blocks there are positions and the embedding, after them the norm's float32 copy and the loss's gradient.
    outside = said.embed_kept(tokens) + said.head_end(tokens)
    row = tokens * SHAPE["hidden_size"] * 4
    if dial == "keep":
        assert kept <= real + 2 * row and real <= kept + outside + row
        assert kept == pytest.approx(real, rel=0.12)
    else:
        assert real == pytest.approx(kept + 2 * row, abs=3 * row)  # the blocks' inputs, and what comes after them


@given(tokens=st.integers(16, 5000), more=st.integers(1, 5000), dial=st.sampled_from(AXES["dial"]), cuda=st.booleans())
@settings(max_examples=40, deadline=None)
def test_more_tokens_need_no_less(planned, tokens, more, dial, cuda):
    said = planned(rows="equal", dtype="bfloat16")
    one = size.Setting("none", dial, tokens, tokens, tokens, compile=cuda)
    two = replace(one, micro_tokens=tokens + more, sequence=tokens + more, tokens=tokens + more)
    needs = [size.need(said, s, cuda=cuda) for s in (one, two)]
    away = dial.endswith("offload") and said.blocks[0].inputs(tokens) < constants.SMALL
    assert needs[0].total <= needs[1].total + (needs[0].kept if away else 0)
    assert step(said, one, CPU).total <= step(said, two, CPU).total


@pytest.mark.parametrize("dial", AXES["dial"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_more_layers_and_higher_ranks_need_no_less(planned, dial, quant):
    setting = size.Setting(quant, dial, 256, 256, 1024)
    by_layers = [size.need(planned(layers=n), setting).total for n in (2, 3, 6)]
    by_rank = [size.need(planned(rank=r), setting).total for r in (2, 4, 16)]
    assert by_layers == sorted(by_layers) and by_layers[0] < by_layers[-1]
    assert by_rank == sorted(by_rank) and by_rank[0] < by_rank[-1]
    times = [step(planned(layers=n), setting, CPU).total for n in (2, 3, 6)]
    assert times == sorted(times)


def test_the_dial_saves_memory_and_the_parts_add_up(planned):
    said = planned(rows="equal", dtype="bfloat16")
    needs = {d: size.need(said, size.Setting("none", d, 16384, 1024, 16384)) for d in AXES["dial"]}
    assert needs["keep"].total > needs["recompute"].total > needs["recompute-offload"].total
    assert needs["recompute-offload"].host > needs["recompute"].host
    for need in needs.values():
        values = need.as_dict()
        parts = ("base", "adapter", "gradients", "optimizer", "kept", "work", "head", "workspace")
        assert need.pool == 0
        assert values["allocated"] == pytest.approx(sum(values[key] for key in parts), abs=len(parts))
        assert values["total"] == pytest.approx(values["allocated"] + values["slack"] + values["context"], abs=3)


@given(budget=st.floats(6.2e8, 3e9), host=st.none() | st.floats(3e9, 5e9), compile=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_plan_never_exceeds_its_budget(planned, budget, host, compile):
    said = planned(rows="equal", dtype="bfloat16")
    wish = Wish(512, 65536, {}, compile)
    try:
        plan = find(said, Budget(budget, host), CARDS[0].rates, wish)
    except PlanError as error:
        every = options(said, Budget(budget, host), CARDS[0].rates, wish)
        assert all(option.reason for option in every) and "\n" not in str(error)
        return
    for option in [plan.chosen, *plan.runners_up]:
        assert option.need.total * (1 + constants.MARGIN) <= budget
        assert host is None or option.need.host <= host
    needs = [plan.chosen.need.allocated, *[option.need.allocated for option in plan.steps_down]]
    assert needs == sorted(needs, reverse=True)
    json.dumps(plan.as_dict())


def test_what_memory_is_left_keeps_the_last_blocks(planned):
    said = planned(rows="equal", dtype="bfloat16", layers=6)
    fixed = {"dial": "recompute", "micro_tokens": 65536, "quant": "none", "stream": "off", "optimizer": "adamw"}
    wish, card = Wish(512, 65536, fixed), CARDS[0].rates
    needs = [
        size.need(said, size.Setting("none", "recompute", 65536, 512, 65536, compile=True, keep=k)) for k in range(7)
    ]
    budget = Budget((needs[3].total + needs[4].total) / 2 * (1 + constants.MARGIN), context=constants.CONTEXT)
    plan = find(said, budget, card, wish)
    assert plan.chosen.setting.keep == 3 and plan.chosen.wanted <= budget.device
    assert plan.steps_down[0].setting == replace(plan.chosen.setting, keep=0)
    assert "keep_blocks 3" in describe(plan.chosen.setting)
    assert find(said, budget, card, replace(wish, fixed=fixed | {"keep": 1})).chosen.setting.keep == 1


def test_cuda_graphs_come_where_twice_a_row_fits(planned):
    said = planned(rows="equal", dtype="bfloat16")
    fixed = {"dial": "recompute", "micro_tokens": 65536, "quant": "none", "stream": "off", "keep": 0}
    setting = size.Setting("none", "recompute", 65536, 512, 65536, compile=True)
    plain, graphs = (
        size.need(said, replace(setting, graphs=wish)).total * (1 + constants.MARGIN) for wish in (False, True)
    )
    assert graphs > plain
    for budget, wish in ((plain * 1.001, False), (graphs * 1.001, True)):
        chosen = find(said, Budget(budget, context=constants.CONTEXT), CARDS[0].rates, Wish(512, 65536, fixed)).chosen
        assert chosen.setting.graphs == wish and chosen.wanted <= budget


def test_a_streamed_4_bit_block_is_there_packed_and_unpacked_and_rows_unpack_nothing(planned):
    said = planned(rows="equal", dtype="bfloat16", layers=6)
    setting = size.Setting("nf4", "recompute-offload", 512, 512, 4096, compile=True, stream="host")
    block, each = said.blocks[0], said.dtype_bytes
    buffers = size.block_bytes(block, "nf4", each) + size.block_bytes(block, "none", each) + block.beside * each
    beside = size.base_bytes(said, setting) - buffers
    assert beside == pytest.approx(said.head * each + said.rest * each)
    resident, eager = replace(setting, stream="off"), replace(setting, compile=False)
    assert [size.unpacks_rows(s) for s in (setting, resident, eager)] == [False, True, True]
    assert size.work_bytes(block, setting.dial, setting, each) < size.work_bytes(block, setting.dial, resident, each)
    times = [step(said, replace(setting, tokens=tokens), CARDS[0].rates).compute for tokens in (512, 4096)]
    assert times[1] < 8 * times[0]  # what is unpacked serves all rows


def test_what_the_user_fixed_stays(planned):
    said = planned(rows="equal", dtype="bfloat16")
    fixed = {"dial": "recompute", "quant": "nf4", "micro_tokens": 512, "optimizer": "adamw-8bit", "stream": "off"}
    chosen = find(said, Budget(4e9), CARDS[0].rates, Wish(512, 4096, fixed)).chosen.setting
    assert {axis: getattr(chosen, axis) for axis in fixed} == fixed


def test_nothing_fits_says_the_least_and_what_to_change(planned):
    said = planned(rows="equal", dtype="bfloat16")
    wish = Wish(65536, 65536, {"dial": "keep", "stream": "off"})
    least = {}
    for option in options(said, Budget(1e12), CARDS[0].rates, replace(wish, fixed={"stream": "off"})):
        plain = size.need(said, replace(option.setting, graphs=False))
        dial, total = option.setting.dial, plain.total * (1 + constants.MARGIN)
        least[dial] = min(total, least.get(dial, total))
    with pytest.raises(PlanError) as raised:
        find(said, Budget((least["keep"] + least["recompute"]) / 2), CARDS[0].rates, wish)
    text = str(raised.value)
    assert text.startswith("nothing fits ") and "the least is " in text and "it fits with train.checkpointing: " in text
    with pytest.raises(PlanError, match="--seq"):
        find(said, Budget(1e9), CARDS[0].rates, replace(wish, fixed={}, sequence=900_000, tokens=900_000))
    with pytest.raises(PlanError, match="of host memory"):
        find(said, Budget(8e9, 1e9), CARDS[0].rates, replace(wish, sequence=512, fixed={}))


def test_options_of_nearly_the_same_time_are_ranked_by_what_they_need(planned):
    """A class begins at its fastest, wherever that lies: a little time more does not move an option over a border."""
    every = [
        option for option in options(planned(), Budget(1e12), CARDS[0].rates, Wish(512, 16_384, {})) if option.time
    ]
    found = ranked(every)
    assert sorted(map(id, found)) == sorted(map(id, every))
    fastest = min(option.time.total for option in every)
    close = [option for option in every if option.time.total <= SAME * fastest]
    assert len(close) > 1 and {id(option) for option in found[: len(close)]} == {id(option) for option in close}
    same_kind = [o for o in found[: len(close)] if replace(o.setting, micro_tokens=0, graphs=False) ==
                 replace(found[0].setting, micro_tokens=0, graphs=False)]  # fmt: skip
    assert same_kind[0] is min(same_kind, key=lambda option: option.need.total)


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "GPT-NeoX", "OPT"])
def test_other_architectures_can_be_planned_for(name, tmp_path):
    model = BY_NAME[name].model()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    said = profile(tmp_path, AdapterConfig(rank=2), rows="split")
    assert len(said.blocks) == 2 and all(block.kept(64) > block.inputs(64) for block in said.blocks)


def test_experts_can_be_planned_for(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = SHAPE | {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**small, head_dim=16, architectures=["Qwen3MoeForCausalLM"]))
    model.config.save_pretrained(tmp_path)
    said = profile(tmp_path, AdapterConfig(rank=2), dtype="bfloat16")
    assert said.numbers == sum(p.numel() for p in [*model.parameters(), *model.buffers()])
    experts = 3 * 64 * 32 * 4  # fused, so no quantisation takes them
    assert said.blocks[1].other > experts
    routed = 2 * 3 * 64 * 32 * 2  # FLOPs of a token in two of them
    assert sum(op.flops.slope for op in said.blocks[1].forward_ops) > routed


def test_a_model_without_a_head_is_refused(tmp_path):
    model = BY_NAME["ViT, image classification"].model()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError):
        profile(tmp_path, AdapterConfig(rank=2))


@pytest.mark.parametrize("text, value", [("8GB", 8_000_000_000), ("7.5 GiB", 8053063680), ("2g", 2_000_000_000)])
def test_sizes(text, value):
    assert parse_size(text) == value
    assert OptimConfig(vram=text).vram == value


@pytest.mark.parametrize("text", ["8 bananas", "8", "-8GB", "", "GB", 12])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="train.vram|vram"):
        OptimConfig(vram=text)


def test_a_machine_without_a_gpu_plans_for_a_card():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    here = machine("auto", 8e9, 32e9)
    assert here.budget.cuda and here.budget.host == 32e9 and here.dtype == "bfloat16"
    assert not machine("auto", None, None).budget.cuda
    with pytest.raises(ConfigError, match="--vram"):
        machine("cuda", None, None)


def test_an_embedding_on_the_host_is_off_the_device(planned):
    said = planned(rows="equal", dtype="bfloat16", tied=False)
    table = said.embedding * said.dtype_bytes
    on, off = (
        size.need(said, size.Setting("none", "keep", 256, 256, 256, embedding=place)) for place in ("device", "host")
    )
    assert said.movable == said.embedding and on.base - off.base == table and off.host - on.host == table
    here = [
        size.need(said, size.Setting("none", "keep", 256, 256, 256, embedding=e), cuda=False)
        for e in ("host", "device")
    ]
    assert here[0].total == here[1].total


def test_an_embedding_that_the_head_shares_is_not_offered(planned):
    tied = planned(rows="equal", dtype="bfloat16", tied=True)
    wish = Wish(256, 256, {})
    assert {o.setting.embedding for o in options(tied, Budget(1e12), CARDS[0].rates, wish)} == {"device"}
    untied = planned(rows="equal", dtype="bfloat16", tied=False)
    plan = find(untied, Budget(1e12), CARDS[0].rates, wish)
    assert plan.chosen.setting.embedding == "device"
    assert any(o.setting.embedding == "host" for o in options(untied, Budget(1e12), CARDS[0].rates, wish))


def test_long_rows_of_a_streamed_base_need_less_than_whole_mlps(planned):
    said = planned(rows="equal", dtype="bfloat16")

    def work(tokens: int) -> float:
        return size.need(said, size.Setting("none", "recompute", tokens, tokens, tokens, stream="host")).work

    assert work(constants.LONG + 4096) < work(constants.LONG) * 1.25
    assert work(8 * constants.LONG) > work(4 * constants.LONG)


@pytest.mark.parametrize("dial", ["offload", "mixed"])
def test_slices_and_small_tensors_of_a_compiled_block_are_not_sent(planned, dial):
    said, tokens = planned(rows="equal", dtype="bfloat16", rank=16), 1 << 16
    block = said.blocks[1]
    lows = {members: each * tokens for each, members in block.lows}
    assert lows == {3: 3 * 16 * 2 * tokens, 2: 2 * 16 * 2 * tokens, 1: 16 * 2 * tokens}  # q k v; gate up; o or down
    assert size.low_bytes(block, tokens) == (2 * lows[1] + lows[2] + lows[3], lows[3])  # three are kept in slices
    stays, sent = size.kept_bytes(block, dial, tokens, True)
    assert stays == lows[3] and sent > lows[2] + 2 * lows[1]
    few = 1 << 14
    assert size.low_bytes(block, few)[1] == (lows[3] + 2 * lows[1]) / 4 < size.low_bytes(block, few)[0]


def test_widened_keys_and_values_are_kept_where_all_is(planned):
    equal, mixed = (planned(rows=rows, dtype="bfloat16").blocks[1] for rows in ("equal", "mixed"))
    tokens = 1000
    assert equal.widened(tokens) == 0 and equal.dear(tokens) == pytest.approx(mixed.dear(tokens))
    keys_and_values = 2 * tokens * SHAPE["hidden_size"] * 2
    assert mixed.widened(tokens) == pytest.approx(keys_and_values / 2, rel=0.02)  # two heads for each of theirs
    kept = {dial: size.kept_bytes(mixed, dial, tokens, True)[0] for dial in ("keep", "selective")}
    norms = constants.NORMS * mixed.inputs(tokens)
    assert kept["keep"] - kept["selective"] == pytest.approx(mixed.widened(tokens) + norms)


def test_rows_of_a_streamed_step_are_not_on_the_device_together(planned):
    said = planned(rows="equal", dtype="bfloat16")
    one, eight = (
        size.need(said, size.Setting("none", "recompute-offload", 16384, 16384, rows * 16384, stream="host"))
        for rows in (1, 8)
    )
    assert eight.kept - one.kept <= 7 * said.embed_kept(16384) + said.blocks[0].inputs(16384)

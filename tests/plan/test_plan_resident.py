"""Blocks of a streamed base that stay on the device, in a plan: what they cost and save, and how many are chosen."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from veneer.adapter.blocks import staying
from veneer.config import AdapterConfig
from veneer.errors import ConfigError
from veneer.plan import bytes as size
from veneer.plan import constants
from veneer.plan.devices import CARDS
from veneer.plan.fit import Budget, Wish, describe, find, judge, options
from veneer.plan.profile import profile
from veneer.plan.roofline import arriving, step
from veneer.report.planned import print_plan

LAYERS = 8
EIGHT_B = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=14336,
               num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
               tie_word_embeddings=False)  # fmt: skip
CARD = next(card for card in CARDS if card.name == "RTX 4090").rates
SLOW = replace(CARD, copy=CARD.copy / 4)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """An 8B shape of eight blocks, from its config.json."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(EIGHT_B | {"num_hidden_layers": LAYERS}))
    return profile(folder, AdapterConfig(rank=16), dtype="bfloat16")


def streamed(**changes):
    return replace(size.Setting("none", "recompute", 512, 512, 2048, compile=True, stream="host"), **changes)


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("compile", [True, False])
def test_each_takes_a_block_on_the_device_and_saves_its_copies(said, where, quant, compile):
    setting = streamed(quant=quant, compile=compile, stream=where)
    through = 1 if compile else 2
    block = size.block_bytes(said.blocks[0], quant, said.dtype_bytes)
    needs = [size.need(said, replace(setting, resident=n)) for n in range(LAYERS + 1)]
    times = [step(said, replace(setting, resident=n), CARD) for n in range(LAYERS + 1)]
    rate = CARD.copy if where == "host" else min(CARD.copy, CARD.disk)
    for n in range(1, LAYERS + 1):
        there = n <= LAYERS - through  # then the buffers of those that come hold all that are left
        assert needs[n].base - needs[n - 1].base == pytest.approx(block if there else 0, abs=1)
        assert needs[n].host == needs[n - 1].host  # whose copy in host memory they keep
        assert times[n - 1].copies - times[n].copies == pytest.approx(2 * block / rate if there else 0)
        assert times[n].compute == times[0].compute
    assert times[0].copies - times[-1].copies == pytest.approx(2 * (LAYERS - through) * block / rate)


def test_what_a_block_does_as_it_arrives_is_done_once_a_pass_whoever_stays(said):
    block, each = said.blocks[0], said.dtype_bytes
    move = arriving(block, streamed(), each, CARD)
    assert move == pytest.approx(2 * block.numbers * each / (CARD.bandwidth * constants.MOVE_SHARE))
    assert arriving(block, streamed(quant="nf4"), each, CARD) > 0
    assert (
        arriving(block, streamed(compile=False), each, CARD) == arriving(block, streamed(stream="off"), each, CARD) == 0
    )
    more = step(said, streamed(quant="nf4", resident=3, tokens=4096), CARD).compute
    assert more < 2 * step(said, streamed(quant="nf4", resident=3), CARD).compute


@pytest.mark.parametrize("blocks", [1, 2, 5, 32])
def test_they_are_spread_evenly(blocks):
    for resident in range(blocks + 1):
        stay = sorted(staying(blocks, resident))
        assert len(stay) == resident
        gaps = {b - a for a, b in zip(stay, stay[1:])}
        assert not gaps or max(gaps) - min(gaps) <= 1
    with pytest.raises(ConfigError, match=f"resident_blocks: {blocks + 1} is more than the model's {blocks} blocks"):
        staying(blocks, blocks + 1)


FIXED = {"quant": "none", "stream": "host", "dial": "recompute", "optimizer": "adamw", "micro_tokens": 512, "keep": 0}


@pytest.mark.parametrize("fits", [0, 3, 6])
def test_the_most_that_fit_are_chosen(said, fits):
    needs = [size.need(said, streamed(resident=n)).total for n in range(LAYERS)]
    budget = Budget((needs[fits] + needs[fits + 1]) / 2 * (1 + constants.MARGIN))
    plan = find(said, budget, SLOW, Wish(512, 2048, FIXED))
    assert plan.chosen.setting == streamed(resident=fits) and plan.chosen.wanted <= budget.device
    assert judge(said, budget, SLOW, streamed(resident=fits + 1)).reason
    assert (f"resident_blocks {fits}" in describe(plan.chosen.setting)) == (fits > 0)
    none = [why for why in plan.not_taken if why.axis == "resident"]
    assert [why.value for why in none] == [0] * (fits > 0) and all("slower" in why.reason for why in none)
    if fits:
        assert plan.steps_down[0].setting == streamed()


def test_none_where_copies_are_hidden(said):
    plan = find(said, Budget(24e9), CARD, Wish(2048, 65536, {"stream": "host", "quant": "none"}))
    assert plan.chosen.setting.resident == 0
    few = find(said, Budget(24e9), CARD, Wish(512, 512, {"stream": "host", "quant": "none"}))
    assert few.chosen.setting.resident > LAYERS - 3


def test_smaller_rows_leave_room_for_more_of_them(said):
    """The plan's is about the fastest of all rows and numbers of blocks, within what counts as equally fast."""
    fixed = {key: value for key, value in FIXED.items() if key not in ("micro_tokens", "dial")}
    wish, budget = Wish(512, 8192, fixed), Budget(6e9, 64e9)
    plan = find(said, budget, SLOW, wish)
    every = [
        judge(said, budget, SLOW, replace(option.setting, resident=n))
        for option in options(said, budget, SLOW, wish)
        for n in range(LAYERS + 1)
    ]
    assert plan.chosen.time.total <= 1.02 * min(option.time.total for option in every if not option.reason)
    assert plan.chosen.setting.resident


def test_what_the_user_fixed_stays_and_a_step_down_drops_it(said):
    wish = Wish(512, 2048, FIXED | {"resident": 4})
    plan = find(said, Budget(24e9), SLOW, wish)
    assert plan.chosen.setting == streamed(resident=4)
    assert plan.steps_down[0].setting == streamed()
    free = find(said, Budget(24e9), SLOW, replace(wish, fixed={"resident": 4, "quant": "none"})).chosen.setting
    assert free.stream == "off" and free.resident == 0  # they are a streamed base's
    with pytest.raises(ConfigError, match="9 is more than the model's 8 blocks"):
        find(said, Budget(24e9), SLOW, replace(wish, fixed=FIXED | {"resident": 9}))


def test_it_is_printed_and_in_the_json(said):
    plan = find(said, Budget(5e9), SLOW, Wish(512, 2048, FIXED))
    count = plan.as_dict()["chosen"]["setting"]["resident"]
    assert 0 < count < LAYERS
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))
    print_plan(plan, console, "title", [])
    text = console.export_text()
    assert f"host −{count}" in text and "n blocks stay on the device (train.resident_blocks)" in text
    assert any(line.split()[:2] == ["resident_blocks", "0"] for line in text.splitlines())

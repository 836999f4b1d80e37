"""Prompts are read together, in pieces, and each is what it would be alone."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serve.served import Alone, GraphEngine, ask, check_growth, engine_of, read, write

from conftest import CORPUS, tiny_llama
from veneer.serve import Engine
from veneer.serve.slots import shares

KINDS = pytest.mark.parametrize("kind", [Engine, GraphEngine])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    write(path / "a", 1, rank=3, targets="qv")
    write(path / "b", 2, rank=8)
    return path


@pytest.fixture
def started(tokenizer, folder, kind):
    engine, _ = engine_of(tokenizer, folder, kind=kind, adapters="ab", slots=6)
    for name in "ab":
        read(ask(engine, "warm", 2, [(name, 1.0)]))
    engine.slots.forget()
    yield engine
    engine.shutdown(0)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.integers(1, 1000), st.sampled_from([1, 16, 256]))
def test_a_pass_takes_all_it_can_and_no_less_than_a_fair_part_of_the_first(rests, budget, least):
    found = shares(rests, budget, least)
    assert sum(found) == min(budget, sum(rests)) and all(0 <= n <= rest for n, rest in zip(found, rests))
    assert found[0] >= min(rests[0], max(least, budget // len(rests)), budget)
    assert all(n == 0 or m > 0 for m, n in zip(found, found[1:]))


def whole_pass(engine):
    """Pieces of one pass: prompts of several lengths, one a later chunk, two that do not end; adapters, a stack, none."""
    a, b = (
        next(n for n, p in enumerate(engine.runner.pool.places) if p.content is engine.registry._names[name])
        for name in "ab"
    )
    uses = [((a, 1.0),), (), ((b, 1.0),), ((a, 0.5), (b, -0.3)), ((b, 1.0),), ()]
    lengths, firsts = [13, 40, 1, 7, 23, 5], [0, 0, 17, 0, 0, 31]
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 400, (n,), generator=draw).tolist() for n in lengths]
    return list(zip(range(6), firsts, tokens, uses)), [True, True, True, False, True, True]


@KINDS
def test_pieces_read_together_give_the_logits_of_each_alone(started):
    pieces, last = whole_pass(started)
    started.runner.cache.store.normal_(generator=torch.Generator().manual_seed(1))  # a past for the later chunks
    together = started.runner.prompts(pieces, last).clone()
    cache = started.runner.cache.store.clone()
    alone = [started.runner.prompts([piece], [True]).clone() for piece, end in zip(pieces, last) if end]
    assert (together - torch.cat(alone)).abs().max() <= 1e-4 * together.abs().max()
    for slot, first, tokens, _ in pieces:
        own = slice(first, first + len(tokens))
        assert torch.allclose(cache[:, :, slot, :, own], started.runner.cache.store[:, :, slot, :, own], atol=1e-4)
    assert started.runner.prompts(pieces[3:4], [False]) is None


@KINDS
def test_prompts_without_an_adapter_are_bit_equal_to_the_base(started):
    pieces, last = whole_pass(started)
    ends = [not uses for (*_, uses), end in zip(pieces, last) if end]
    mixed = started.runner.prompts(pieces, last).clone()
    plain = started.runner.prompts([(slot, first, tokens, ()) for slot, first, tokens, _ in pieces], last)
    assert sum(ends) == 2 and torch.equal(mixed[ends], plain[ends])
    assert not any(torch.equal(one, other) for one, other, base in zip(mixed, plain, ends) if not base)


@KINDS
def test_a_prompt_that_is_cancelled_half_read_leaves_no_trace(started, folder, tokenizer, monkeypatch):
    alone = Alone(tokenizer, {name: folder / name for name in "ab"})
    whole, passes, tickets = started.runner.prompts, [], []

    def read_and_cancel(pieces, last):
        passes.append([len(tokens) for _, _, tokens, _ in pieces])
        if len(passes) == 2:
            tickets[0].cancel()
        return whole(pieces, last)

    monkeypatch.setattr(started.runner, "prompts", read_and_cancel)
    text = CORPUS[2]
    started.least, started.chunk = 4, 1
    tickets.append(ask(started, text, 9, [("b", 1.0)]))
    (last,) = list(tickets[0])
    assert last.finish_reason == "cancelled" and sum(map(sum, passes)) < len(tokenizer(text)["input_ids"])
    others = [(stack, ask(started, text, 9, stack)) for stack in ([("a", 1.0)], [("b", 1.0)], [])]
    for stack, ticket in others:
        assert read(ticket) == alone(stack, text, 9)
    assert started.slots.free == 6


@KINDS
def test_a_pool_that_grows_and_goes_serves_what_is_asked_for(tokenizer, tmp_path, kind):
    check_growth(tokenizer, tmp_path, tiny_llama, kind)


def test_what_was_prepared_for_adapters_is_there_for_the_first(tokenizer, tmp_path):
    """A server that has answered from the base alone, or rested, makes nothing anew when an adapter is asked for."""
    write(tmp_path / "a", 1)
    engine, registry = engine_of(tokenizer, tmp_path, kind=GraphEngine, adapters="a")
    read(ask(engine, "to be", 2))
    pool, prepared = engine.runner.pool, dict(engine.runner.steps)
    version = pool.version
    read(ask(engine, "to be", 2, [("a", 1.0)]))
    assert pool.version == version and any(room for *_, room in prepared)
    assert all(engine.runner.steps[key] is step for key, step in prepared.items())
    registry.unload("a")
    while pool.stacks:
        time.sleep(0.01)
    engine.shutdown(0)

"""Every answer is what its adapters answer alone, whoever else is being served."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref

import pytest
import torch
from serve.served import Alone, GraphEngine, ask, engine_of, read, write

from conftest import CORPUS, tiny_llama
from veneer.errors import ConfigError
from veneer.serve import AdapterExists, Engine, Overloaded, PromptTooLong, Request, Sampling, ServeError, UnknownAdapter

KINDS = pytest.mark.parametrize("kind", [Engine, GraphEngine])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    write(path / "a", 1, rank=3, targets="qv")
    write(path / "b", 2, rank=8)
    write(path / "c", 3, rank=5, targets="mlp", rslora=True)
    return path


@pytest.fixture(scope="module")
def alone(folder, tokenizer):
    return Alone(tokenizer, {name: folder / name for name in "abc"})


@pytest.fixture
def started(tokenizer, folder):
    """Makes engines and shuts them down."""
    engines = []

    def make(**options):
        engines.append(engine_of(tokenizer, folder, **options))
        return engines[-1]

    yield make
    for engine, _ in engines:
        engine.shutdown(0)


@KINDS
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_are_those_of_each_adapter_alone(started, alone, kind, seed):
    """Random prompts with common starts, chunked, in few slots, with more adapters than fit on the device or host."""
    engine, _ = started(kind=kind, adapters="abc", registry={"device_slots": 2, "host_slots": 1})
    rng, asked = random.Random(seed), []
    stacks = [(), (("a", 1.0),), (("b", 1.0),), (("c", 1.0),), (("a", 0.7), ("b", -0.3)), (("c", 2.0),)]
    for _ in range(24):
        text = rng.choice(CORPUS[:2])[: rng.randrange(20, 60)]
        stack, new = rng.choice(stacks), rng.randrange(1, 12)
        asked.append((stack, text, new, ask(engine, text, new, stack)))
        time.sleep(rng.random() * 0.01)
    for stack, text, new, ticket in asked:
        assert read(ticket) == alone(stack, text, new)
    stats = engine.stats()
    assert stats["cached_tokens"] > 0
    assert stats["requests"] == dict(engine.metrics.finished) and sum(stats["requests"].values()) == 24
    assert (stats["running"], stats["waiting"]) == (0, 0)


def test_rows_without_an_adapter_are_bit_equal_to_the_base(started, tokenizer):
    engine, registry = started(adapters="ab")
    read(ask(engine, "warm", 2, [("a", 1.0)])), read(ask(engine, "warm", 2, [("b", 1.0)]))
    places = [n for n, p in enumerate(engine.runner.pool.places) if p.content]
    rows = [(0, 5, 7, ()), (1, 5, 8, ((places[0], 1.0),)), (2, 5, 9, ())]
    mixed = engine.runner.tokens(rows)
    plain = engine.runner.tokens([(slot, at, token, ()) for slot, at, token, _ in rows])
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]]) and not torch.equal(mixed[1], plain[1])


def test_the_model_is_as_before_after_shutdown(tokenizer, folder):
    model = tiny_llama()
    ids = torch.arange(2, 30)[None]
    before, kinds = model(ids).logits, [type(m) for m in model.modules()]
    engine, _ = engine_of(tokenizer, folder, model, adapters="a")
    read(ask(engine, "Hello", 3, [("a", 1.0)]))
    engine.shutdown(5)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(ids).logits, before)


def test_a_prefix_is_shared_by_content_and_weight_and_never_by_name(started, folder, alone):
    engine, registry = started(adapters="ab", slots=6)
    registry.load("same", "a")
    text = CORPUS[2]

    def cached(adapters):
        pieces = list(ask(engine, text, 2, adapters))
        return pieces[-1].usage.cached

    length = len(engine.tokenizer(text)["input_ids"])
    assert cached([("a", 1.0)]) == 0
    assert cached([("a", 1.0)]) == cached([("same", 1.0)]) == length - 1
    assert cached([("a", 0.5)]) == cached([("b", 1.0)]) == cached([]) == 0
    registry.load("a", "b", replace=True)
    assert registry.info("a").content == registry.info("b").content
    assert cached([("a", 1.0)]) == length - 1  # b's, for it is b
    assert read(ask(engine, text, 6, [("a", 1.0)])) == alone([("b", 1.0)], text, 6)


def test_a_running_request_lends_its_prefix(started, alone):
    engine, _ = started(adapters="a", slots=4)
    text = CORPUS[0]
    first = ask(engine, text, 60, [("a", 1.0)], ignore_eos=True)
    next(iter(first))
    others = [ask(engine, text, 5, [("a", 1.0)]) for _ in range(3)]
    for ticket in others:
        pieces = list(ticket)
        assert pieces[-1].usage.cached > 0
        assert "".join(p.text for p in pieces) == alone([("a", 1.0)], text, 5)[0]


@KINDS
def test_reloading_a_name_changes_new_requests_and_not_running_ones(started, alone, kind):
    engine, registry = started(kind=kind, adapters="a")
    text = next(t for t in CORPUS if alone([("a", 1.0)], t, 50)[1] > 20)
    old = iter(ask(engine, text, 50, [("a", 1.0)]))
    pieces = [next(old)]
    with pytest.raises(AdapterExists):
        registry.load("a", "b")
    registry.load("a", "b", replace=True)
    new = ask(engine, text, 20, [("a", 1.0)])
    assert read(new) == alone([("b", 1.0)], text, 20)
    pieces += old
    wanted = alone([("a", 1.0)], text, 50)
    assert ("".join(p.text for p in pieces), pieces[-1].usage.completion, pieces[-1].finish_reason) == wanted


def test_unloading_frees_everything_once_requests_are_done(started):
    engine, registry = started(adapters="ab")
    ticket = ask(engine, CORPUS[0], 40, [("a", 1.0)], ignore_eos=True)
    next(iter(ticket))
    host = weakref.ref(registry._names["a"].host)
    for name in "ab":
        registry.unload(name)
    with pytest.raises(UnknownAdapter):
        ask(engine, "Hello", 2, [("a", 1.0)])
    assert list(ticket)[-1].finish_reason == "length"
    end = time.monotonic() + 5
    while engine.runner.pool.stacks and time.monotonic() < end:
        time.sleep(0.02)
    gc.collect()
    assert host() is None and not engine.runner.pool.stacks
    assert registry.tiers() == {"device": 0, "host": 0, "disk": 0} and registry.names() == []


def test_cancelling_frees_the_slot(started):
    engine, _ = started(slots=1)
    running, waiting = ask(engine, "Hello", 100, ignore_eos=True), ask(engine, "there", 100, ignore_eos=True)
    next(iter(running))
    waiting.cancel(), running.cancel()
    assert list(running)[-1].finish_reason == list(waiting)[-1].finish_reason == "cancelled"
    assert read(ask(engine, "Hello", 2, ignore_eos=True))[1:] == (2, "length")
    assert engine.stats()["running"] == 0


def test_overload_is_refused_at_once(started):
    engine, _ = started(slots=1, queue=1)
    tickets = [ask(engine, "Hello", 90, ignore_eos=True) for _ in range(2)]
    with pytest.raises(Overloaded) as refused:
        ask(engine, "Hello", 1)
    assert refused.value.retry_after >= 1
    for ticket in tickets:
        ticket.cancel()
        list(ticket)
    assert read(ask(engine, "Hello", 1, ignore_eos=True))[2] == "length"


def test_requests_that_cannot_be_served_are_refused(started):
    engine, _ = started(adapters="a")
    for request, error in [
        (Request([], Sampling(4)), PromptTooLong),
        (Request([1] * 120, Sampling(9)), PromptTooLong),
        (Request([1], Sampling(0)), PromptTooLong),
        (Request([99999], Sampling(4)), PromptTooLong),
        (Request([1], Sampling(4), (("a", float("nan")),)), ConfigError),
        (Request([1], Sampling(4), (("a", 1.0),) * 9), ConfigError),
        (Request([1], Sampling(4), tuple((name, 1.0) for name in "abcd")), ConfigError),  # three fit on the device
        (Request([1], Sampling(4), (("nobody", 1.0),)), UnknownAdapter),
    ]:
        with pytest.raises(error):
            engine.submit(request)
    assert engine.stats()["waiting"] == 0


def test_shutdown_drains_and_then_cancels(tokenizer, folder):
    engine, _ = engine_of(tokenizer, folder)
    tickets = [ask(engine, "Hello", 20, ignore_eos=True) for _ in range(5)]
    engine.shutdown(60)
    assert [read(ticket)[1:] for ticket in tickets] == [(20, "length")] * 5
    with pytest.raises(ServeError, match="shutting down"):
        ask(engine, "Hello", 2)
    engine, _ = engine_of(tokenizer, folder, slots=1)
    tickets = [ask(engine, "Hello", 120, ignore_eos=True) for _ in range(5)]
    engine.shutdown(0)
    assert [read(ticket)[2] for ticket in tickets] == ["cancelled"] * 5


def test_a_failing_pass_ends_its_requests_and_not_the_engine(started, monkeypatch):
    engine, _ = started(adapters="a")
    whole, failed = engine.runner.tokens, []

    def fail(*arguments):
        if not failed:
            failed.append(1)
            raise RuntimeError("out of something\nand more")
        return whole(*arguments)

    monkeypatch.setattr(engine.runner, "tokens", fail)
    last = list(ask(engine, "Hello", 5, [("a", 1.0)], ignore_eos=True))[-1]
    assert (last.finish_reason, last.error) == ("error", "the model failed: out of something")
    assert read(ask(engine, "Hello", 5, ignore_eos=True))[1:] == (5, "length")


def test_files_that_changed_on_disk_are_never_served_as_the_old_ones(tokenizer, tmp_path):
    for name, seed in (("x", 5), ("y", 6)):
        write(tmp_path / name, seed)
    engine, registry = engine_of(
        tokenizer, tmp_path, adapters="xy", registry={"host_slots": 1, "device_slots": 1}, slots=1
    )
    try:
        assert registry.info("x").tier == "disk"
        write(tmp_path / "x", 7)
        last = list(ask(engine, "Hello", 4, [("x", 1.0)]))[-1]
        assert last.finish_reason == "error" and "load it again" in last.error
        registry.load("x", "x", replace=True)
        truth = Alone(tokenizer, {"x": tmp_path / "x"})
        assert read(ask(engine, "Hello", 4, [("x", 1.0)])) == truth([("x", 1.0)], "Hello", 4)
    finally:
        engine.shutdown(0)


def test_a_pinned_adapter_stays_on_the_device(started):
    engine, registry = started(registry={"device_slots": 2})
    registry.load("a", "a", pinned=True), registry.load("b", "b"), registry.load("c", "c")
    for name in "abcbcb":
        read(ask(engine, "Hello", 2, [(name, 1.0)]))
    assert registry.info("a").tier == "device" and registry.info("b").tier == "device"
    assert registry.info("c").tier == "host"


def test_an_adapter_gets_its_place_although_another_is_always_in_use(started, monkeypatch):
    monkeypatch.setattr("veneer.serve.engine.PATIENCE", 0.05)
    engine, _ = started(adapters=["a", "b"], slots=2, registry={"device_slots": 1})

    def use():
        return ask(engine, "Hello", 60, [("a", 1.0)], ignore_eos=True)

    running = [use(), use()]
    read(ask(engine, "Hello", 1))  # by now one of them is at work
    answered, other = 0, ask(engine, "Hello", 2, [("b", 1.0)])
    threading.Thread(target=lambda: read(other), daemon=True).start()
    while not other._finished and answered < 30:
        running.append(use())
        read(running.pop(0))  # the other one is at work still
        answered += 1
    for ticket in running:
        ticket.cancel()
    assert answered < 30


@KINDS
def test_an_answer_with_a_seed_does_not_depend_on_its_neighbours(started, kind):
    engine, _ = started(kind=kind, adapters="ab")
    rules = {"temperature": 1.5, "top_p": 0.9, "seed": 11, "ignore_eos": True}
    lone = read(ask(engine, "Hello", 12, [("a", 1.0)], **rules))
    tickets = [ask(engine, f"other {n}", 20, [("b", 1.0)], temperature=1.0, ignore_eos=True) for n in range(2)]
    assert read(ask(engine, "Hello", 12, [("a", 1.0)], **rules)) == lone
    assert read(ask(engine, "Hello", 12, [("a", 1.0)], **rules | {"seed": 12})) != lone
    greedy = read(ask(engine, "Hello", 12, [("a", 1.0)], ignore_eos=True))
    assert read(ask(engine, "Hello", 12, [("a", 1.0)], **rules | {"top_p": 1.0, "top_k": 1})) == greedy
    for ticket in tickets:
        list(ticket)


def test_logprobs_are_the_models(started, tokenizer):
    engine, _ = started()
    ids = tokenizer("Hello there")["input_ids"]
    pieces = list(ask(engine, ids, 4, logprobs=2, ignore_eos=True))
    found = [note for piece in pieces for note in piece.logprobs]
    tokens = [token for piece in pieces for token in piece.tokens]
    scores = tiny_llama()(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    assert [note.token for note in found] == tokens and len(tokens) == 4
    for note, row in zip(found, scores):
        best, index = row.topk(2)
        assert [t for t, _ in note.top] == index.tolist()
        assert [note.logprob, *(v for _, v in note.top)] == pytest.approx(
            [float(row[note.token]), *best.tolist()], abs=1e-4
        )


def test_a_stop_string_over_several_tokens_ends_the_answer(started, alone):
    engine, _ = started(adapters="b")
    text, *_ = alone([("b", 1.0)], CORPUS[2], 30)
    stop = text[9:14]
    got = read(ask(engine, CORPUS[2], 30, [("b", 1.0)], stop=("never there", stop)))
    assert (got[0], got[2]) == (text[: text.find(stop)], "stop")


def test_a_grammar_restricts_the_tokens(started, tokenizer):
    class Cycle:
        def __init__(self):
            self.seen = []

        def allowed(self):
            if len(self.seen) == 6:
                return []
            if len(self.seen) % 2:
                mask = torch.zeros(420, dtype=torch.bool)
                mask[30] = True
                return mask
            return [40, 41]

        def accept(self, token):
            self.seen.append(token)

    engine, _ = started()
    grammar = Cycle()
    other = ask(engine, "Hello", 10, ignore_eos=True)
    pieces = list(ask(engine, "Hello", 10, grammar=grammar))
    tokens = [token for piece in pieces for token in piece.tokens]
    assert tokens == grammar.seen and set(tokens[1::2]) == {30} and set(tokens[::2]) <= {40, 41} and len(tokens) == 6
    assert pieces[-1].finish_reason == "stop"
    list(other)


def test_pieces_arrive_in_an_event_loop(started, alone):
    engine, _ = started(adapters="a")

    async def gather(adapters):
        return "".join([piece.text async for piece in ask(engine, CORPUS[1], 10, adapters)])

    async def both():
        return await asyncio.gather(gather([("a", 1.0)]), gather([]))

    assert asyncio.run(both()) == [alone([("a", 1.0)], CORPUS[1], 10)[0], alone([], CORPUS[1], 10)[0]]


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral", "Qwen3"])
def test_other_models(kind, tokenizer, tmp_path):
    """Biases, a sliding window, norms on queries and keys."""
    import transformers

    def make():
        torch.manual_seed(3)
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=420, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=128, eos_token_id=0, pad_token_id=0, bos_token_id=None,
            **{"sliding_window": 7} if kind == "Mistral" else {},
        )  # fmt: skip
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)

    write(tmp_path / "a", 1, model=make())
    truth = Alone(tokenizer, {"a": tmp_path / "a"}, make())
    for engine_kind in (Engine, GraphEngine):
        engine, _ = engine_of(tokenizer, tmp_path, make(), kind=engine_kind, adapters="a")
        tickets = [(stack, ask(engine, CORPUS[0], 12, stack)) for stack in ([], [("a", 1.0)])]
        for stack, ticket in tickets:
            assert read(ticket) == truth(stack, CORPUS[0], 12)
        engine.shutdown(0)


def test_models_that_cannot_be_served_are_refused(tokenizer, tmp_path):
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, attn_logit_softcapping=5.0,
    )  # fmt: skip
    with pytest.raises(ServeError, match="soft-caps"):
        engine_of(tokenizer, tmp_path, transformers.Gemma2ForCausalLM(config).eval())

"""What goes wrong in one answer stays there: no other is changed, none waits for ever, and the health check tells."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from serve.served import GraphEngine, ask, engine_of, read, write
from starlette.testclient import TestClient

import veneer
from conftest import tiny_llama
from veneer.serve import Engine, ServeError
from veneer.serve.app import create_app
from veneer.serve.guided import Guide
from veneer.serve.problems import ApiError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`a`, and `diverged`, whose factors are finite and whose products are not."""
    path = tmp_path_factory.mktemp("adapters")
    write(path / "a", 1)
    model = tiny_llama()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, target_modules="all-linear"))
    for parameter in bank.parameters("default").values():
        parameter.data.normal_(std=1e20, generator=torch.Generator().manual_seed(1))
    veneer.save_adapter(model, path / "diverged")
    return path


@pytest.mark.parametrize("kind", [Engine, GraphEngine])
def test_an_adapter_that_gives_nan_ends_with_an_error_and_leaves_none_behind(tokenizer, folder, kind):
    engine, _ = engine_of(tokenizer, folder, kind=kind, adapters=["a", "diverged"])
    asked = [("Hi you", 6, ()), ("a longer prompt than that", 20, [("a", 1.0)]), ("Hi you", 6, ())]
    truth = [read(ask(engine, *one, ignore_eos=True)) for one in asked]
    for rules in ({}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 2}):
        for ticket in [ask(engine, "x" * 30, 9, [("diverged", 1.0)], **rules) for _ in range(5)]:
            pieces = list(ticket)
            assert pieces[-1].finish_reason == "error" and "finite" in pieces[-1].error and len(pieces) == 1
    cut = ask(engine, "x" * 90, 9, [("diverged", 1.0)])
    cut.cancel()
    list(cut)
    for _ in range(3):
        tickets = [ask(engine, *one, ignore_eos=True) for one in asked]
        assert [read(ticket) for ticket in tickets] == truth
    assert engine.runner.cache.store.isfinite().all()
    engine.shutdown(0)


@pytest.mark.parametrize("part", ["allowed", "accept"])
def test_a_grammar_that_fails_ends_its_answer_alone(tokenizer, folder, part):
    def fail(*arguments):
        raise RuntimeError("too complex")

    grammar = SimpleNamespace(**{"allowed": lambda: None, "accept": lambda token: None} | {part: fail})
    engine, _ = engine_of(tokenizer, folder)
    truth = read(ask(engine, "Hello", 20, ignore_eos=True))
    other = ask(engine, "Hello", 20, ignore_eos=True)
    last = list(ask(engine, "Hello", 9, grammar=grammar))[-1]
    assert last.finish_reason == "error" and "too complex" in last.error
    assert read(other) == truth
    engine.shutdown(0)


def test_an_engine_that_failed_says_so(tokenizer, folder, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda *arguments: None)
    engine, registry = engine_of(tokenizer, folder)
    options = {"base": "tiny", "context": engine.context}
    with TestClient(create_app(engine, registry, tokenizer, engine.runner.model, **options)) as http:
        assert http.get("/health").status_code == 200

        def fail():
            raise RuntimeError("the device is gone")

        engine._drop_cancelled = fail
        ticket = ask(engine, "Hello", 9)
        assert list(ticket)[-1].finish_reason == "error"
        for found in (http.get("/health"), http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})):
            assert found.status_code == 503 and "the device is gone" in found.json()["error"]["message"]
        with pytest.raises(ServeError, match="failed"):
            ask(engine, "Hello", 9)
    engine.shutdown(0)


def test_a_reading_that_ends_while_it_is_asked_about_is_no_failure(tokenizer, folder):
    """The reading thread takes its future away when it is done."""
    _, registry = engine_of(tokenizer, folder, adapters=["a"])
    (content,) = registry.acquire(["a"])

    class Ending(Future):
        def done(self):
            content.loading = None
            return True

    content.loading = Ending()
    content.loading.set_result(None)
    assert registry.failure(content) is None


def test_a_schema_that_allows_nothing_is_refused(tokenizer):
    pytest.importorskip("llguidance")
    guide = Guide(tokenizer, vocabulary=420, ends=[0])
    with pytest.raises(ApiError, match="cannot be followed") as raised:
        guide.json({"$defs": {"n": {"anyOf": [{"$ref": "#/$defs/n"}]}}, "$ref": "#/$defs/n"})
    assert raised.value.status == 400 and "\n" not in str(raised.value)

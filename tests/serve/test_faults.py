"""What goes wrong in one answer stays there: no other is changed, none waits for ever, and the health check tells."""

from __future__ import annotations

import asyncio
import json
import shutil
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from serve.served import GraphEngine, ask, engine_of, read, write
from starlette.testclient import TestClient

import veneer
from conftest import tiny_llama
from veneer.serve import Engine, Registry, ServeError
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


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_left_before_its_answer_began_frees_its_slot(tokenizer, folder, stream):
    engine, registry = engine_of(tokenizer, folder)
    app = create_app(engine, registry, tokenizer, engine.runner.model, base="tiny", context=engine.context)
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 100, "ignore_eos": True, "stream": stream}
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    headers = [(b"host", b"x"), (b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "method": "POST"}
    scope |= {"path": "/v1/completions", "raw_path": b"", "query_string": b"", "headers": headers, "scheme": "http"}

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        pass

    asyncio.run(app(scope, receive, send))
    engine.shutdown(20)
    assert engine.stats()["requests"] == {"cancelled": 1}
    with TestClient(app) as http:
        assert f'status="{200 if stream else 499}"' in http.get("/metrics").text or stream


def test_faults_are_counted(tokenizer, folder, monkeypatch):
    engine, registry = engine_of(tokenizer, folder)
    app = create_app(engine, registry, tokenizer, engine.runner.model, base="tiny", context=engine.context)

    def fail(*arguments):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(registry, "info", fail)
    registry.load("a", "a")
    with TestClient(app, raise_server_exceptions=False) as http:
        assert http.get("/v1/adapters").status_code == 500
        assert 'method="GET",route="/v1/adapters",status="500"} 1.0' in http.get("/metrics").text
    engine.shutdown(0)


def test_names_of_one_content_have_paths_of_their_own(tokenizer, folder, tmp_path):
    for name in ("x", "y"):
        shutil.copytree(folder / "a", tmp_path / name)
    shutil.copytree(folder / "diverged", tmp_path / "z")
    registry = Registry(tiny_llama(), allowed=[tmp_path], host_slots=1)
    one, two = registry.load("one", "x"), registry.load("two", "y")
    assert one.content == two.content and registry.info("one").path == tmp_path / "x"
    registry.unload("two")
    shutil.rmtree(tmp_path / "y")
    registry.load("other", "z")
    assert registry.info("one").tier == "disk"
    (content,) = registry.acquire(["one"])
    content.loading.result(20)
    assert registry.ready(content) and registry.failure(content) is None
    registry.close()

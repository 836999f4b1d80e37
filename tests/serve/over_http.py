"""The application over the fake engine, behind a real HTTP server on a free port."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fakes import FakeEngine, FakeRegistry

from conftest import tiny_llama
from veneer.serve.app import create_app


@contextmanager
def running(app):
    """The application behind a real HTTP server on a free port; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@dataclass
class Served:
    """A running application and what is behind it."""

    app: Any
    engine: FakeEngine
    registry: FakeRegistry
    url: str
    folder: Path


@pytest.fixture
def serve(tokenizer, tmp_path):
    """`with serve(…) as served`: options of `create_app`; `delay` is the fake engine's, in seconds a token."""

    @contextmanager
    def make(delay=0.0, **options):
        folder = tmp_path / "adapters"
        folder.mkdir(exist_ok=True)
        registry = FakeRegistry([folder], ["first", "second"])
        engine = FakeEngine(registry, tokenizer, delay=delay)
        options = {"base": "tiny", "context": engine.context, "allowed": [folder]} | options
        app = create_app(engine, registry, tokenizer, tiny_llama(), **options)
        with running(app) as url:
            yield Served(app, engine, registry, url, folder)

    return make

"""Schemathesis sends what the OpenAPI document allows, and what it does not; the answers must be as documented.

The engine is a real one on a tiny random model.
"""

import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from conftest import tiny_llama
from veneer.adapter.attach import attach
from veneer.config import AdapterConfig
from veneer.formats.peft import save_adapter
from veneer.serve.app import create_app
from veneer.serve.engine import Engine
from veneer.serve.registry import Registry

KEY = {"Authorization": "Bearer k"}
OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/load_lora_adapter", "POST"),
    ("/v1/unload_lora_adapter", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/v1/adapters", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
]
MAY_NOT_SUCCEED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models/{model}")
SAID_IN_WORDS = re.compile(
    "top_logprobs needs|stream_options goes with|is not in the vocabulary|exceeds the context|the schema cannot be followed"
    "|a prompt is empty|answers$|the stack|is not supported by this server|the base model's name"
)
"""Rules that a schema cannot say, or does not; every other request that the document allows must be accepted."""


@pytest.fixture(scope="module")
def engine(make_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    attach((model := tiny_llama()), AdapterConfig(rank=4), seed=1)
    save_adapter(model, folder / "first")
    registry = Registry(tiny_llama(), allowed=[folder])
    registry.load("first", folder / "first")
    engine = Engine(registry.model, make_tokenizer(), registry, slots=16, context=256)
    engine.start()
    yield engine
    engine.shutdown(0)


@pytest.fixture(scope="module")
def document(engine):
    options = {"base": "tiny", "context": engine.context, "allowed": engine.registry.allowed, "api_key": "k"}
    app = create_app(engine, engine.registry, engine.tokenizer, engine.registry.model, **options)
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=KEY)


def test_every_operation_is_fuzzed(document):
    assert {(o.ok().path, o.ok().method.upper()) for o in document.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize("path, method", OPERATIONS)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_fuzz(document, engine, path, method, mode):
    operation, statuses = document[path][method], set()
    if mode is GenerationMode.NEGATIVE and method == "GET":
        return  # has no parameter to get wrong, but for a name, and any text is one

    @given(case=operation.as_strategy(mode), model=st.sampled_from(["tiny", "first", "tiny:first*0.5", None]))
    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def send(case, model):
        if mode is GenerationMode.POSITIVE and "model" in getattr(case.body, "keys", tuple)():
            case.body |= {"max_tokens": 3} | ({"model": model} if model else {})
            case.body.pop("max_completion_tokens", None)
        response = case.call(headers=KEY)
        statuses.add(response.status_code)
        known = response.status_code == 400 and SAID_IN_WORDS.search(response.json()["error"]["message"])
        excluded = [CHECKS.get_one("positive_data_acceptance")] if known else []
        case.validate_response(response, headers=KEY, excluded_checks=excluded)

    send()
    if mode is GenerationMode.POSITIVE and path not in MAY_NOT_SUCCEED:
        assert 200 in statuses
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0

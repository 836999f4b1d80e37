"""Schemathesis sends what the OpenAPI document allows, and what it does not; the answers must be as documented."""

import re

import pytest
import schemathesis
from fakes import FakeEngine, FakeRegistry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from conftest import tiny_llama
from veneer.serve.app import create_app

KEY = {"Authorization": "Bearer k"}
OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/load_lora_adapter", "POST"),
    ("/v1/unload_lora_adapter", "POST"),
    ("/v1/models", "GET"),
    ("/v1/adapters", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
]
SAID_IN_WORDS = re.compile(
    "top_logprobs needs|stream_options goes with|is not in the vocabulary|new ones$|the schema cannot be followed|a prompt is"
    " empty|answers$|the stack|is not supported by this server|the base model's name"
)
"""Rules that a schema cannot say, or does not; every other request that the document allows must be accepted."""


@pytest.fixture(scope="module")
def document(make_tokenizer, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("adapters"), make_tokenizer()
    registry = FakeRegistry([folder], ["first"])
    options = {"base": "tiny", "context": 4096, "allowed": [folder], "api_key": "k"}
    app = create_app(FakeEngine(registry, tokenizer, 4096), registry, tokenizer, tiny_llama(), **options)
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=KEY)


def test_every_operation_is_fuzzed(document):
    assert {(o.ok().path, o.ok().method.upper()) for o in document.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize("path, method", OPERATIONS)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_fuzz(document, path, method, mode):
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        return  # has no parameter to get wrong

    @given(case=operation.as_strategy(mode), model=st.sampled_from(["tiny", "first", "tiny:first*0.5", None]))
    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def send(case, model):
        if model and mode is GenerationMode.POSITIVE and "model" in getattr(case.body, "keys", tuple)():
            case.body["model"] = model
        response = case.call(headers=KEY)
        known = response.status_code == 400 and SAID_IN_WORDS.search(response.json()["error"]["message"])
        excluded = [CHECKS.get_one("positive_data_acceptance")] if known else []
        case.validate_response(response, headers=KEY, excluded_checks=excluded)

    send()

"""What a Ray replica runs. Ray itself is not in the tests: the recipe asks it for one thing, an ingress from `build`."""

import sys
import types
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from veneer.formats.peft import save_adapter


@pytest.fixture
def recipe(monkeypatch, model_dir, tmp_path):
    from conftest import tiny_llama
    from veneer.adapter.attach import attach
    from veneer.config import AdapterConfig

    attach((model := tiny_llama()), AdapterConfig(rank=4), seed=1)
    save_adapter(model, tmp_path / "adapters" / "one")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "recipes")
    monkeypatch.setenv("VENEER_BASE", str(model_dir))
    monkeypatch.setenv("VENEER_ADAPTERS", str(tmp_path / "adapters"))
    monkeypatch.setenv("VENEER_API_KEY", "k")
    import ray_serve

    return ray_serve


def test_a_replica(recipe):
    app = recipe.build()
    with TestClient(app, headers={"Authorization": "Bearer k"}) as client:
        ids = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert ids[1:] == ["one"]
        ask = {"model": "one", "prompt": "hello", "max_tokens": 4, "temperature": 0}
        assert client.post("/v1/completions", json=ask).json()["usage"]["completion_tokens"] == 4
        for path in recipe.READ_ONLY:
            assert client.post(path, json={"lora_name": "one", "lora_path": "one"}).status_code == 403
    with TestClient(app, headers={"Authorization": "Bearer k"}, raise_server_exceptions=False) as client:
        assert client.post("/v1/completions", json=ask).status_code == 503  # its engine has ended


def test_the_deployment(recipe, monkeypatch):
    seen = {}

    class Bound:
        def bind(self):
            return "application"

    def deployment(**options):
        return lambda made: seen.update(options, made=made) or Bound()

    serve = types.SimpleNamespace(ingress=lambda build: lambda: build, deployment=deployment)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(serve=serve))
    monkeypatch.setenv("VENEER_REPLICAS", "3")
    monkeypatch.setenv("VENEER_GPUS", "0.5")
    assert recipe.application == "application"
    assert seen["made"] is recipe.build and seen["num_replicas"] == 3
    assert seen["ray_actor_options"]["num_gpus"] == 0.5
    assert seen["ray_actor_options"]["runtime_env"]["env_vars"]["VENEER_API_KEY"] == "k"

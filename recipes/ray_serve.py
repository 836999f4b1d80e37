"""Several replicas of one server behind one address, with Ray Serve: `pip install "ray[serve]"`, then

    VENEER_BASE=smollm2-135m-instruct VENEER_ADAPTERS=$PWD/adapters serve run recipes.ray_serve:application

VENEER_REPLICAS and VENEER_GPUS (of each replica, may be a fraction) say how many; VENEER_API_KEY is asked of requests.
Each replica owns a model, an engine and all adapters, and answers the whole API; Ray sends a request to the least busy
one and replaces what dies. Adapters are the same on all replicas, so they are not loaded over HTTP here: a load would
reach one replica and leave the others without it. Put them into the folder and deploy again.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from veneer import load_base
from veneer.serve.app import create_app
from veneer.serve.engine import Engine
from veneer.serve.folders import name_adapters
from veneer.serve.problems import ApiError
from veneer.serve.registry import Registry

READ_ONLY = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


def build() -> FastAPI:
    """The application of one replica, over an engine of its own; runs when Ray starts the replica."""
    base, folder = os.environ["VENEER_BASE"], Path(os.environ["VENEER_ADAPTERS"]).resolve()
    model, tokenizer = load_base(base)
    registry = Registry(model, allowed=[folder])
    for name, path in name_adapters([folder]).items():
        registry.load(name, path)
    engine = Engine(model, tokenizer, registry, slots=int(os.environ.get("VENEER_SLOTS", 16)))
    engine.start()
    app = create_app(
        engine,
        registry,
        tokenizer,
        model,
        base=Path(base).name,
        context=engine.context,
        api_key=os.environ.get("VENEER_API_KEY"),
    )

    @app.middleware("http")
    async def same_adapters_everywhere(request, call_next):
        if request.url.path in READ_ONLY:
            return ApiError(403, "adapters are the same on all replicas: change the folder and deploy again").response()
        return await call_next(request)

    @asynccontextmanager
    async def finish_at_the_end(app: FastAPI):
        yield
        engine.shutdown(30)

    app.router.lifespan_context = finish_at_the_end
    return app


def deploy():
    """The Ray application."""
    from ray import serve

    options = {
        "num_replicas": int(os.environ.get("VENEER_REPLICAS", 2)),
        "ray_actor_options": {
            "num_gpus": float(os.environ.get("VENEER_GPUS", 0)),
            "runtime_env": {"env_vars": {key: value for key, value in os.environ.items() if key.startswith("VENEER_")}},
        },
        "max_ongoing_requests": 128,  # beyond these a request waits in Ray; the engine's own 429 comes first
        "graceful_shutdown_timeout_s": 60,
    }
    return serve.deployment(**options)(serve.ingress(build)()).bind()


def __getattr__(name: str):
    """`serve run` asks for `application`; only then is Ray needed."""
    if name == "application":
        return deploy()
    raise AttributeError(name)

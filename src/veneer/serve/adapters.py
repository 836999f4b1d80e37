"""Endpoints over the adapters: vLLM's two, with its bodies and answers, and a list for the page."""

from __future__ import annotations

from asyncio import Semaphore
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from veneer.errors import ConfigError, VeneerError
from veneer.serve.errors import AdapterExists, AdapterRefused, UnknownAdapter
from veneer.serve.folders import find_adapters, short_name
from veneer.serve.names import check_name
from veneer.serve.problems import STATUSES, TEXT_STATUSES, ApiError
from veneer.serve.schema import LoadRequest, UnloadRequest

USER = "InvalidUserInput"
MAX_OFFERED = 500
READING = 4
"""Adapters that are read at once: threads are shared with those who tokenise prompts, and each takes its memory."""


class Loaded(BaseModel):
    name: str
    path: str
    content: str
    rank: int
    targets: int
    bytes: int
    pinned: bool
    tier: str


class Offered(BaseModel):
    name: str
    path: str


class AdapterList(BaseModel):
    """What is loaded, and what lies in the allowed folders."""

    base: str
    context: int
    """Tokens of a prompt and its answer."""
    loaded: list[Loaded]
    offered: list[Offered]


def add_adapter_routes(app: FastAPI, registry: Any, *, base: str, context: int, allowed: list[Path]) -> None:
    """/v1/load_lora_adapter, /v1/unload_lora_adapter and /v1/adapters."""
    text = {"response_class": PlainTextResponse, "responses": TEXT_STATUSES}
    reading = Semaphore(READING)

    @app.post("/v1/load_lora_adapter", **text)
    async def load_lora_adapter(body: LoadRequest) -> str:
        name = body.lora_name
        if not name or not body.lora_path:
            raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.", USER)
        if name in (base, "base"):
            raise ApiError(400, f"'{name}' is the base model's name.", USER, param="lora_name")
        try:
            options = {"pinned": body.pinned, "replace": body.load_inplace}
            async with reading:
                await run_in_threadpool(registry.load, check_name(name), body.lora_path, **options)
        except AdapterExists:
            said = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True."
            )
            raise ApiError(400, said, USER, param="lora_name") from None
        except AdapterRefused as error:
            raise ApiError(403, str(error), "PermissionDeniedError", param="lora_path") from None
        except VeneerError as error:
            param = "lora_name" if isinstance(error, ConfigError) else "lora_path"
            raise ApiError(400, str(error), USER, param=param) from None
        return f"Success: LoRA adapter '{name}' added successfully."

    @app.post("/v1/unload_lora_adapter", **text)
    async def unload_lora_adapter(body: UnloadRequest) -> str:
        name = body.lora_name
        if not name:
            raise ApiError(400, "'lora_name' needs to be provided to unload a LoRA adapter.", USER)
        try:
            await run_in_threadpool(registry.unload, name)
        except UnknownAdapter:
            said = f"The lora adapter '{name[:200]}' cannot be found."
            raise ApiError(404, said, "NotFoundError", param="lora_name") from None
        return f"Success: LoRA adapter '{name}' removed successfully."

    @app.get("/v1/adapters", response_model=AdapterList, responses=STATUSES)
    def adapters() -> AdapterList:
        loaded = []
        for name in registry.names():
            try:
                info = registry.info(name)
            except UnknownAdapter:  # unloaded meanwhile
                continue
            loaded.append(Loaded(**{key: getattr(info, key) for key in Loaded.model_fields} | {"path": str(info.path)}))
        found = [path for folder in allowed for path in find_adapters(folder)][:MAX_OFFERED]
        offered = [Offered(name=short_name(path), path=str(path)) for path in found]
        return AdapterList(base=base, context=context, loaded=loaded, offered=offered)

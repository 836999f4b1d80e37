"""The HTTP application: OpenAI's endpoints, vLLM's for adapters, health, metrics, and the web page."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.middleware import Middleware

from veneer.base.generate import end_tokens
from veneer.serve.adapters import add_adapter_routes
from veneer.serve.answers import Events, Logprobs, Running, new_id, stream
from veneer.serve.asked import Asked, Reader
from veneer.serve.guard import Guard
from veneer.serve.guided import Guide
from veneer.serve.names import UnknownModel, parse_model
from veneer.serve.problems import STATUSES, TEXT_STATUSES, ApiError, add_handlers
from veneer.serve.prometheus import CONTENT_TYPE, Counted, Metrics
from veneer.serve.request import Piece
from veneer.serve.schema import (
    Answer,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    Health,
    ModelCard,
    ModelList,
    Sampled,
    TextChoice,
    TextCompletion,
)
from veneer.version import __version__

WEB = Path(__file__).parent / "web"
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS = {"content": {"text/event-stream": {"schema": _EVENT}}, "description": "The answer, or its chunks as events"}


def create_app(
    engine: Any,
    registry: Any,
    tokenizer: Any,
    model: Any,
    *,
    base: str,
    context: int,
    allowed: Iterable[Path] = (),
    api_key: str | None = None,
    hosts: Iterable[str] | None = None,
) -> FastAPI:
    """An application over a started engine; who starts and shuts down the engine is the caller.

    `model` is the engine's, of which only the configuration is read; `base` is the name that the base is served under,
    `context` the engine's, `allowed` the folders that adapters may be offered from; `api_key` is asked of every request
    but for /health and the page's files; `hosts` are the names that requests may call the server by (None: any).
    """
    metrics = Metrics(engine.stats)
    app = FastAPI(
        title="Veneer",
        version=__version__,
        description="Many LoRA adapters on one base, behind OpenAI's API.",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
    )
    add_handlers(app)
    vocabulary = model.config.get_text_config().vocab_size
    guide = Guide(tokenizer, vocabulary=vocabulary, ends=end_tokens(model, tokenizer))
    reader = Reader(tokenizer, context=context, vocabulary=vocabulary, guide=guide, most=engine.limit)
    add_openai_routes(app, engine, registry, reader, base=base)
    add_adapter_routes(app, registry, base=base, context=context, allowed=[Path(folder) for folder in allowed])

    @app.get("/health", response_model=Health, responses=STATUSES)
    async def health() -> dict[str, str]:
        if engine.fault is not None:
            raise ApiError(503, f"the engine failed: {engine.fault}", "server_error")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=TEXT_STATUSES)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    add_page(app)
    app.openapi = lambda: openapi(app, keyed=bool(api_key))
    routes = frozenset(route.path for route in app.routes)
    app.user_middleware[:0] = [
        Middleware(Counted, metrics=metrics, routes=routes),
        Middleware(Guard, api_key=api_key, hosts=hosts),
    ]
    return app


def add_openai_routes(app: FastAPI, engine: Any, registry: Any, reader: Reader, *, base: str) -> None:
    """/v1/models, /v1/chat/completions and /v1/completions."""
    logprobs, started, context = Logprobs(reader.tokenizer), int(time.time()), reader.context

    async def run(body: Sampled, read: Any) -> Running:
        """Tokenise in a thread, so that a long prompt holds nobody up, and submit."""
        adapters = parse_model(body.model, base, registry.names())
        asked: Asked = await run_in_threadpool(read, body, adapters)
        return Running(engine.submit, asked)

    def cards() -> dict[str, ModelCard]:
        shared = {"created": started, "max_model_len": context}
        found = {base: ModelCard(id=base, root=base, **shared)}
        return found | {name: ModelCard(id=name, root=name, parent=base, **shared) for name in registry.names()}

    @app.get("/v1/models", response_model=ModelList, responses=STATUSES)
    async def models() -> ModelList:
        return ModelList(data=list(cards().values()))

    @app.get("/v1/models/{model:path}", response_model=ModelCard, responses=STATUSES)
    async def model(model: str) -> ModelCard:
        if model not in (found := cards()):
            raise UnknownModel(f"The model `{model[:200]}` does not exist.")
        return found[model]

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=STATUSES | {200: EVENTS})
    async def chat(body: ChatRequest, http: HttpRequest) -> Any:
        running = await run(body, reader.chat)
        head = new_id("chatcmpl") | {"model": body.model}

        def chunk(index: int, piece: Piece) -> dict[str, Any]:
            shown = logprobs.chat(piece.logprobs) if piece.logprobs else None
            delta = {"content": piece.text} if piece.text else {}
            return {"index": index, "delta": delta, "logprobs": shown, "finish_reason": piece.finish_reason}

        if body.stream:
            opening = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            first = [{"index": index} | opening for index in range(len(running.tickets))]
            return Events(running, stream(running, head | {"object": "chat.completion.chunk"}, chunk, first))
        choices = [
            ChatChoice(
                index=index,
                message=Answer(content=one.text),
                logprobs=logprobs.chat(one.logprobs) if body.logprobs else None,
                finish_reason=one.finish_reason,
            )
            for index, one in enumerate(await running.gather(http))
        ]
        return ChatCompletion(**head, choices=choices, usage=running.usage())

    @app.post("/v1/completions", response_model=TextCompletion, responses=STATUSES | {200: EVENTS})
    async def completions(body: CompletionRequest, http: HttpRequest) -> Any:
        running = await run(body, reader.completion)
        head = new_id("cmpl") | {"model": body.model}
        offsets: dict[int, int] = {}

        def chunk(index: int, piece: Piece) -> dict[str, Any]:
            shown = logprobs.text(piece.logprobs, offsets.get(index, 0)) if piece.logprobs else None
            offsets[index] = offsets.get(index, 0) + sum(map(len, shown["tokens"] if shown else ()))
            return {"index": index, "text": piece.text, "logprobs": shown, "finish_reason": piece.finish_reason}

        if body.stream:
            return Events(running, stream(running, head | {"object": "text_completion"}, chunk, []))
        choices = [
            TextChoice(
                index=index,
                text=one.text,
                logprobs=None if body.logprobs is None else logprobs.text(one.logprobs),
                finish_reason=one.finish_reason,
            )
            for index, one in enumerate(await running.gather(http))
        ]
        return TextCompletion(**head, choices=choices, usage=running.usage())


def add_page(app: FastAPI) -> None:
    """The page and its files, named one by one: no path of a request reaches the file system."""
    for path, name in (
        ("/", "index.html"),
        ("/web/app.js", "app.js"),
        ("/web/style.css", "style.css"),
        ("/web/icon.svg", "icon.svg"),
    ):

        def answer(file: Path = WEB / name) -> FileResponse:
            return FileResponse(file, headers=PAGE_HEADERS)

        app.get(path, include_in_schema=False)(_without_parameters(answer))


def _without_parameters(function: Any) -> Any:
    async def plain() -> Response:
        return function()

    return plain


def openapi(app: FastAPI, *, keyed: bool) -> dict[str, Any]:
    """The document, with what FastAPI does not know: bad requests are 400 here and not 422; the key."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        if keyed:
            document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["security"] = [] if path == "/health" else [{"key": []}]
    return app.openapi_schema

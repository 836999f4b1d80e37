"""What stands before every route: whose page and host a request names, its key, how large its body is.

A server on the loopback address is within reach of every page that its user opens. Such a page can name the server by a
host of its own (DNS rebinding) or send it a form; so a loopback server answers to loopback names alone, and a request
that a page of another origin made is refused. There are no CORS headers.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from veneer.serve.problems import ApiError

OPEN = ("/", "/health", "/web/app.js", "/web/style.css", "/web/icon.svg")
"""Answered without a key: the page's own files hold nothing, and asks for the key itself."""
MAX_BODY = 8 * 2**20


def hosts_for(host: str, more: Iterable[str] = ()) -> list[str] | None:
    """Names that requests may call a server by that is bound to `host`, `more` among them; None: any.

    A loopback server goes by loopback names; any other by every name, unless some are given.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    more = list(more)
    return [host, "localhost", "127.0.0.1", "::1", *more] if loopback or more else None


def host_of(header: str) -> str:
    """The host of a Host header, without port and brackets, in lower case; "" if it is none."""
    try:
        return (urlsplit(f"//{header}").hostname or "").rstrip(".")
    except ValueError:
        return ""


class Guard:
    """ASGI middleware. `hosts`: the names that a request may call the server by; None for any."""

    def __init__(self, app: Any, *, api_key: str | None = None, hosts: Iterable[str] | None = None) -> None:
        self.app = app
        self.key = f"Bearer {api_key}".encode() if api_key else None
        self.hosts = {host.lower() for host in hosts} if hosts is not None else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers: dict[bytes, bytes] = dict(scope["headers"])
        problem = self.problem(scope["path"], headers)
        if problem:
            return await problem.response()(scope, receive, send)
        await self.app(scope, _limited(receive), send)

    def problem(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        """Why a request is refused, from its path and headers alone; None if it is not."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts is not None and host_of(host) not in self.hosts:
            return ApiError(403, f"this server is not called {host_of(host)[:100]!r}: --allow-host adds a name")
        origin = headers.get(b"origin")
        if origin is not None and _place_of(origin.decode("latin-1")) != host.lower():
            return ApiError(403, "pages of other origins may not use this server")
        if self.key and path not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self.key):
                said = "Incorrect API key provided" if given else "An API key is needed: Authorization: Bearer KEY"
                return ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return _too_large()
        return None


def _place_of(origin: str) -> str | None:
    """Host and port of an Origin header, in lower case; None if it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _too_large() -> ApiError:
    return ApiError(413, f"the body is over {MAX_BODY >> 20} MiB", code="request_too_large")


def _limited(receive: Any) -> Any:
    """`receive`, which raises once a body without a length has grown over the limit."""
    size = 0

    async def limited() -> dict[str, Any]:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise HTTPException(413, str(_too_large()))  # what FastAPI lets through while it reads a body
        return message

    return limited

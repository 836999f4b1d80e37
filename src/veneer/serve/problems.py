"""What goes wrong, as the OpenAI API says it: {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from veneer.errors import VeneerError
from veneer.serve.errors import Overloaded, PromptTooLong, ServeError, UnknownAdapter
from veneer.serve.names import UnknownModel
from veneer.serve.schema import ErrorBody

INVALID = "invalid_request_error"
STATUSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is malformed, or asks for what is not served"},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong"},
    403: {"model": ErrorBody, "description": "The request comes from a foreign page or for a foreign host"},
    404: {"model": ErrorBody, "description": "No such model or adapter"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    429: {"model": ErrorBody, "description": "Overloaded: try again after the seconds in Retry-After"},
    500: {"model": ErrorBody, "description": "The engine failed"},
    503: {"model": ErrorBody, "description": "Shutting down"},
}

JSON_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
TEXT_STATUSES = {
    status: {"description": found["description"], "content": JSON_ERROR} for status, found in STATUSES.items()
}
"""`STATUSES` of a route that answers in plain text: its errors are JSON all the same."""


class ApiError(VeneerError):
    """An answer other than 200, on purpose."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Any of the product's errors as an answer; what is no `VeneerError` is a fault of the server's."""
    text = str(error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        wait = {"Retry-After": str(max(1, round(error.retry_after)))}
        return ApiError(429, text, "rate_limit_error", code="rate_limit_exceeded", headers=wait)
    if isinstance(error, ServeError):
        return ApiError(503, text, "server_error")
    if isinstance(error, (UnknownModel, UnknownAdapter)):
        return ApiError(404, text, "not_found_error", param="model", code="model_not_found")
    if isinstance(error, PromptTooLong):
        return ApiError(400, text, code="context_length_exceeded")
    if isinstance(error, VeneerError):
        return ApiError(400, text)
    return ApiError(500, f"internal error ({type(error).__name__})", "server_error")


def _from_validation(error: RequestValidationError) -> ApiError:
    """One line about the first thing that is wrong; of a union, of which every form failed, about the union."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    places = [[str(part) for part in one["loc"] if part != "body"] for one in problems]
    param = places[0][0] if places[0] else None
    if param is None:
        return ApiError(400, f"the body is no JSON object of this endpoint: {first['msg']}")
    same = [(place, one["msg"]) for place, one in zip(places, problems) if place[0] == param]
    where = ".".join(part for part in places[0] if "[" not in part and "-" not in part)
    said = " or ".join(dict.fromkeys(message for _, message in same)) if len(same) > 1 else f"{first['msg']}"
    return ApiError(400, f"{where if len(same) == 1 else param}: {said[:500]}", param=param)


def add_handlers(app: FastAPI) -> None:
    """Every error of `app` leaves in the OpenAI form."""

    @app.exception_handler(VeneerError)
    async def veneer_error(request: Request, error: VeneerError) -> JSONResponse:
        return as_api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _from_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        kind = "server_error" if error.status_code >= 500 else INVALID
        headers = dict(error.headers or {})
        return ApiError(error.status_code, str(error.detail), kind, headers=headers).response()

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from chai_export.errors import ChaiError, printable, reason
from chai_export.progress import note
from chai_export.serve.engine import ClosedError, QueueFullError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_TEXTS = {404: "there is no such address; see docs/serving.md", 405: "this address takes another method"}


class ApiError(Exception):
    """What a client is told, with a status of HTTP."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = printable(str(self))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer that is sent."""
        return _AsciiResponse(self.body(), self.status, headers=self.headers)


class _AsciiResponse(JSONResponse):
    """A message may quote text that is no Unicode."""

    def render(self, content: Any) -> bytes:
        import json

        return json.dumps(content).encode("ascii")


def as_api_error(error: ChaiError, status: int = 400) -> ApiError:
    """An error of the engine or of a prompt, with ``status`` where nothing else is known of it."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="shutting_down")
    return ApiError(status, str(error))


def add_handlers(app: FastAPI) -> None:
    """Answer every failure in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def api(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(ChaiError)
    async def of_ours(request: Request, error: ChaiError) -> JSONResponse:
        return as_api_error(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        text = _TEXTS.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, text, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def body(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        note(f"error: unexpected {type(error).__name__} at {request.url.path}: {reason(error)}")
        return ApiError(500, "the server failed at this request; its log says where").response()


def _invalid(error: RequestValidationError) -> ApiError:
    """The first finding about a body."""
    finding = error.errors()[0]
    where = [str(part) for part in finding["loc"] if part != "body"]
    if finding["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({finding.get('ctx', {}).get('error', 'unreadable')})")
    text = " ".join(finding["msg"].split()).removeprefix("Value error, ")
    if not where and finding["type"] == "value_error":
        return ApiError(400, text)
    if not where:
        return ApiError(400, "the body is no JSON object; send one with Content-Type: application/json")
    param = where[0]
    if finding["type"] == "extra_forbidden":
        name = ".".join(where)
        return ApiError(400, f"{name} is not a field that this server knows; leave it out", param=param)
    return ApiError(400, f"{'.'.join(where)}: {text}", param=param)

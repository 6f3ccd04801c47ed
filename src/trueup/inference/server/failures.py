"""What a server says when it cannot: OpenAI's error shape, for everything that goes wrong."""

from __future__ import annotations

import http
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from trueup.rollout.generation import EngineClosed, QueueFull, TooLong

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        message: a sentence for the caller; never a path of this machine, never a stack.
        param: the request's field that is at fault. code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def refuse(param: str, message: str, code: str | None = None) -> ApiError:
    """A request that cannot be meant, or that we cannot honour: 400."""
    return ApiError(400, f"{param}: {message}", param, code)


def busy(message: str, status: int = 503) -> ApiError:
    """Ask again later."""
    code = "rate_limit_exceeded" if status == 429 else "unavailable"
    return ApiError(status, message, code=code, headers={"retry-after": "1"})


def too_late() -> ApiError:
    return ApiError(504, "the request's time is over", code="deadline_exceeded")


def not_answered(error: BaseException) -> ApiError:
    """What an engine says, for the caller."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return busy("as many requests are waiting as this server takes; ask again soon", 429)
        case EngineClosed():
            return busy("the server is about to end")
        case TooLong():
            return ApiError(400, str(error), code="context_length_exceeded")
        case ValueError():
            return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, "the model failed on this request", code="internal_error")


def not_valid(error: ValidationError) -> ApiError:
    """The first of what is wrong with a body, naming the field as a program would write it."""
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ""
    for part in found["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    text = found["msg"]
    return ApiError(400, f"{param}: {text}" if param else text, param or None, found["type"])


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    return not_answered(error).response()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """The framework's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = f"{request.method} of this path: {http.HTTPStatus(status).phrase.lower()}"
    return ApiError(status, message, code=codes.get(status), headers=error.headers).response()


async def on_bug(request: Request, error: Exception) -> JSONResponse:
    """Ours. The stack goes to the log."""
    return ApiError(500, "the server failed on this request", code="internal_error").response()

"""What stands before every route: who asks, by which name, and how much they send. Denies unless all is well."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trueup.inference.server.failures import ApiError, busy
from trueup.inference.server.settings import Settings

_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_WITH_BODY = ("POST", "PUT", "PATCH", "DELETE")


class Guard:
    """An application behind its checks, whatever the path and the method.

    Every answer has an `x-request-id`: the caller's own, where it is a plain word.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings, self.limits = app, settings, settings.limits
        self._digest = hashlib.sha256(settings.key.encode()).digest() if settings.key else None
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        known = _REQUEST_ID.fullmatch(headers.get("x-request-id", ""))
        number = known[0] if known else f"req_{secrets.token_hex(12)}"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = number
                sent["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            self._check(scope, headers)
        except ApiError as error:
            await error.response()(scope, receive, answer)
            return
        self._open += 1
        try:
            await self.app(scope, self._bounded(receive), answer)
        finally:
            self._open -= 1

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError."""
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > self.limits.headers:
            raise ApiError(431, "the headers are too large", code="headers_too_large")
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.settings.answers_to(hosts[0]):
            raise ApiError(403, "this server does not answer to that Host name", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and not self.settings.answers_to(urlsplit(origin).netloc):
            raise ApiError(403, "pages of another site may not ask this server", code="origin_not_allowed")
        if not self._admits(headers):
            raise ApiError(
                401, "a token is needed: Authorization: Bearer …", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        if self._open >= self.limits.requests:
            raise busy("as many requests are open as this server takes")
        if scope["method"] in _WITH_BODY:
            self._check_body(headers)

    def _admits(self, headers: Headers) -> bool:
        if self._digest is None:
            return True
        given = headers.getlist("authorization")
        kind, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        found = hashlib.sha256(token.strip().encode("latin-1")).digest()
        return hmac.compare_digest(found, self._digest) and kind.lower() == "bearer"

    def _check_body(self, headers: Headers) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site could send others without asking first
            raise ApiError(415, "the body has to be of content-type application/json", code="unsupported_media_type")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.limits.body:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """The same, as far as the body may go, and not for ever."""
        read, arrived = 0, False

        async def bounded() -> Message:
            nonlocal read, arrived
            if arrived:  # what still comes is that the client goes
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.limits.upload)
            except TimeoutError:
                raise ApiError(408, "the body did not arrive in time", code="request_timeout") from None
            read += len(message.get("body", b""))
            if read > self.limits.body:
                raise self._too_large()
            arrived = not message.get("more_body", False)
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.limits.body:,} bytes", code="body_too_large")

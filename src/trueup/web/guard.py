"""What stands before every page, upload and websocket: who asks, by which name, from which page. Denies unless all
is well. The API server's rules (inference/server/guard.py), for browsers: a cookie in place of a header.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import deque
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trueup.inference.server.settings import Settings, host_name
from trueup.web.login import login_page

SESSION_COOKIE = "trueup_session"
LOGIN = "/login"
UPLOAD_BYTES = 2 * 2**30
_MESSAGE_BYTES = 8 * 2**20  # what socket.io may send at once when websockets do not get through
_TRIES, _TRY_SECONDS = 5, 60.0
_SAFE = ("GET", "HEAD", "OPTIONS")

#: NiceGUI builds its templates in the browser, which needs inline and eval; everything else is ours alone.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Refused(Exception):
    """An answer that is a refusal."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class StudioGuard:
    """An application behind its checks, whatever the path, the method and the protocol."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._session = session_of(settings.key) if settings.key else None
        self._failures: dict[str, deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_caller(scope, headers)
            admitted = self._admits(headers)
        except Refused as refused:
            await self._refuse(scope, receive, send, PlainTextResponse(refused.message, refused.status))
            return
        if scope["type"] == "websocket":
            if admitted:
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        if self._session and scope["path"] == LOGIN:
            await self._login(scope, headers, receive, send)
        elif admitted:
            await self.app(scope, self._bounded(scope, headers, receive), _with_headers(send))
        else:
            await self._refuse(scope, receive, send, self._ask(scope, headers))

    # --- who asks ----------------------------------------------------------------------------

    def _check_caller(self, scope: Scope, headers: Headers) -> None:
        """Raises Refused."""
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > self.settings.limits.headers:
            raise Refused(431, "the headers are too large")
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.settings.answers_to(hosts[0]):
            raise Refused(403, "this server does not answer to that Host name")
        origin = headers.get("origin")
        changes = scope["type"] == "websocket" or scope["method"] not in _SAFE
        bearer = "authorization" in headers  # a program: no page of another site can send that header
        if origin is None and changes and not bearer:
            raise Refused(403, "an Origin is needed")
        if origin is not None and not self._is_own(urlsplit(origin).netloc, hosts[0]):
            raise Refused(403, "pages of another site may not ask this server")
        if headers.get("sec-fetch-site", "same-origin") == "cross-site" and (
            changes or headers.get("sec-fetch-mode") != "navigate"
        ):
            raise Refused(403, "pages of another site may not ask this server")

    def _is_own(self, origin: str, host: str) -> bool:
        """A page of this server; behind a proxy, of the name it was told."""
        known = {name.lower() for name in self.settings.hosts}
        return origin.lower() == host.lower() or host_name(origin) in known

    def _admits(self, headers: Headers) -> bool:
        if self._session is None:
            return True
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return _same(session_of(token.strip()), self._session)
        cookies = cookie_parser(headers.get("cookie", ""))
        return _same(cookies.get(SESSION_COOKIE, ""), self._session)

    def _ask(self, scope: Scope, headers: Headers) -> Response:
        """A person is led to the page that asks for the token; a program is told."""
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return RedirectResponse(LOGIN, 303)
        return PlainTextResponse("a token is needed", 401, {"www-authenticate": "Bearer"})

    # --- logging in --------------------------------------------------------------------------

    async def _login(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        language = headers.get("accept-language", "")
        if scope["method"] != "POST":
            await login_page(language)(scope, receive, _with_headers(send))
            return
        caller = (scope.get("client") or ("", 0))[0]
        if self._is_slow(caller):
            page = login_page(language, wrong="slow", status=429)
            await page(scope, receive, _with_headers(send))
            return
        token = await _form_token(receive)
        response: Response
        if _same(session_of(token), str(self._session)):
            self._failures.pop(caller, None)
            response = RedirectResponse("/", 303)
            secure = scope.get("scheme") == "https"
            response.set_cookie(
                SESSION_COOKIE, str(self._session), max_age=30 * 86400, httponly=True, samesite="strict", secure=secure
            )
        else:
            self._failures.setdefault(caller, deque(maxlen=_TRIES)).append(time.monotonic())
            response = login_page(language, wrong="token", status=403)
        await response(scope, receive, _with_headers(send))

    def _is_slow(self, caller: str) -> bool:
        """Whether a caller has guessed too often of late. X-Forwarded-For is not believed."""
        failures = self._failures.get(caller, ())
        return len(failures) == _TRIES and time.monotonic() - failures[0] < _TRY_SECONDS

    # --- how much ----------------------------------------------------------------------------

    def _bounded(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        limit = UPLOAD_BYTES if headers.get("content-type", "").startswith("multipart/form-data") else _MESSAGE_BYTES
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return message if read <= limit else {"type": "http.disconnect"}

        return bounded

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, response: Response) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await response(scope, receive, _with_headers(send))


def session_of(token: str) -> str:
    """What a browser keeps in place of the token."""
    return hmac.new(token.encode("utf-8", "surrogateescape"), b"trueup studio session", hashlib.sha256).hexdigest()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def _with_headers(send: Send) -> Send:
    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            sent = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                sent[name] = value
        await send(message)

    return answer


async def _form_token(receive: Receive) -> str:
    """The field `token` of a small form."""
    body = b""
    while len(body) < 4096:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0]

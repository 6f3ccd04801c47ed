"""OpenAI-compatible endpoints: one reply to one conversation, with patience; many at the same time.

A request goes to the URL given and nowhere else: redirects are refused. Replies have a limit in time and in size. The
API key is read from the environment when a request is made, and is in no message.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import logging
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trueup.errors import ConfigError

log = logging.getLogger("trueup")

T = TypeVar("T")
Task = TypeVar("Task")

MOST_BYTES = 8_000_000  # of a reply
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries
PATIENT_WITH = (408, 409, 425, 429)  # and with 5xx: asked again later
HOPELESS = (401, 403, 404, 405)  # for every request alike
IN_A_ROW = 8  # prompts without a reply after which the endpoint counts as gone for this run
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Unanswered(Exception):
    """A request that got no usable reply; the text says why. Another run may have more luck."""


@dataclass(frozen=True)
class Reply:
    """What a model said. Token counts are the endpoint's own, 0 where it gives none."""

    text: str
    ended: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Spent:
    """What an endpoint was asked in this run; `price`: of a million tokens, read and written."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    price: tuple[float, float] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    @property
    def cost(self) -> float | None:
        """In the price's money, as far as the endpoint counts its tokens; None without a price."""
        if self.price is None:
            return None
        read, written = self.price
        return (self.prompt_tokens * read + self.completion_tokens * written) / 1e6

    def in_words(self) -> str:
        """ "0.42 spent", or nothing where there is no price."""
        return "" if self.cost is None else f"{money(self.cost)} spent"

    def to_dict(self) -> dict[str, Any]:
        told = {name: value for name, value in vars(self).items() if not name.startswith("_") and value is not None}
        return told if self.cost is None else {**told, "cost": self.cost}


def money(cost: float) -> str:
    """Two places, and more where little was spent."""
    return f"{cost:,.2f}" if cost >= 0.1 or not cost else f"{cost:.2g}"


class Endpoint:
    """A model behind an OpenAI-compatible URL.

    Args:
        name: URL#MODEL; the URL with or without `/chat/completions`.
        key_env: environment variable with the API key, if it takes one.
        options: further fields of every request; None drops one of ours.
        where: the config's key that named it, for messages.
        price: what a million tokens cost, read and written.

    Raises:
        ConfigError: the variable is not set, or the name has no model.
    """

    def __init__(
        self,
        name: str,
        *,
        key_env: str | None = None,
        seconds: float = 120.0,
        tries: int = 5,
        options: Mapping[str, Any] | None = None,
        where: str = "judge_model",
        price: Sequence[float] = (),
    ) -> None:
        url, _, self.model = name.partition("#")
        url, _, self._query = url.partition("?")  # some want a version there; it may hold what is not to be told
        self.url = url.rstrip("/")
        if not self.url.endswith("/chat/completions"):
            self.url += "/chat/completions"
        if not self.model:
            raise ConfigError(f"{name} names no model", where=where, expected="URL#MODEL")
        self.key_env, self.seconds, self.tries, self.where = key_env, seconds, tries, where
        self.options = dict(options or {})
        self.spent = Spent(price=(price[0], price[1]) if price else None)
        self._opener = urllib.request.build_opener(_NoRedirect)
        if key_env:
            _check_key(key_env, self.url, where)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its replies, as far as we know."""
        return {"url": self.url, "model": self.model, "options": self.options}

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        read: Callable[[Reply], T],
        when_junk: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> T:
        """What `read` makes of the reply to a conversation; asked again when it raises ValueError.

        `fields` go into the request; `when_junk` beside them once a reply could not be read.

        Raises:
            Unanswered: after all tries. ConfigError: the endpoint refuses every request alike.
        """
        pause, why = FIRST_PAUSE, ""
        for attempt in range(self.tries):
            if attempt:
                self.spent.add(retries=1)
                time.sleep(min(pause, LONGEST_PAUSE) * random.uniform(0.75, 1.25))
            try:
                reply = self._post(messages, fields)
            except _Later as later:
                why, pause = str(later), later.seconds or 2 * pause
                continue
            try:
                return read(reply)
            except ValueError as junk:
                why, fields = str(junk), {**fields, **(when_junk or {})}
                pause = 0.0
        raise Unanswered(why)

    def events(self, path: str, fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What a streamed request is answered with, chunk by chunk; asked again only as long as nothing has come.

        Args:
            path: after the URL's `/v1`, such as `/completions`.

        Raises:
            Unanswered: after all tries, or in the middle. ConfigError: the endpoint refuses every request alike.
        """
        pause, why = FIRST_PAUSE, ""
        for attempt in range(self.tries):
            if attempt:
                self.spent.add(retries=1)
                time.sleep(min(pause, LONGEST_PAUSE) * random.uniform(0.75, 1.25))
            begun = False
            try:
                with self._calling(), self._open({"stream": True, **fields}, path) as response:
                    for event in self._chunks(response):
                        begun = True
                        yield event
                return
            except _Later as later:
                why, pause = str(later), later.seconds or 2 * pause
                if begun:
                    break
        raise Unanswered(why)

    def _post(self, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> Reply:
        with self._calling(), self._open({"messages": list(messages), **fields}) as response:
            found = _parse(self._read(response))
        self.spent.add(prompt_tokens=found.prompt_tokens, completion_tokens=found.completion_tokens)
        return found

    def _open(self, fields: Mapping[str, Any], path: str = "/chat/completions") -> http.client.HTTPResponse:
        body = {"model": self.model, **fields, **self.options}
        body = {name: value for name, value in body.items() if value is not None}
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if self.key_env:
            headers["Authorization"] = f"Bearer {os.environ.get(self.key_env, '')}"
        url = self.url.removesuffix("/chat/completions") + path
        target = f"{url}?{self._query}" if self._query else url
        request = urllib.request.Request(target, json.dumps(body).encode(), headers)
        self.spent.add(requests=1)
        return self._opener.open(request, timeout=self.seconds)

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """What goes wrong on the way, as `_Later`, Unanswered or ConfigError."""
        try:
            yield
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _Later(self._clean(f"{type(error).__name__}: {reason}")) from None
        except ValueError as error:
            raise _Later(self._clean(f"not a completion: {error}")) from None

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """The JSON of server-sent events until `[DONE]`."""
        size = 0
        while line := response.readline(MOST_BYTES):
            size += len(line)
            if size > MOST_BYTES:
                raise ValueError(f"a reply of more than {MOST_BYTES:,} bytes")
            name, _, value = line.decode("utf-8").strip().partition(":")
            if name != "data":  # comments keep the connection alive
                continue
            if value.strip() == "[DONE]":
                return
            event = json.loads(value)
            if not isinstance(event, dict) or "error" in event:
                raise ValueError(value.strip()[:300])
            yield event
        raise ValueError("the stream ends in the middle")

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """The whole body, within the limits."""
        parts, size, deadline = [], 0, time.monotonic() + self.seconds
        while part := response.read1(65536):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise ValueError(f"a reply of more than {MOST_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the reply takes more than {self.seconds:g} s")
        return b"".join(parts)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status means for us."""
        with error:
            try:
                said = error.read1(2000).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):
                said = ""
        what = self._clean(f"HTTP {error.code}: {' '.join(said.split())[:300]}")
        if error.code in PATIENT_WITH or error.code >= 500:
            return _Later(what, _retry_after(error.headers.get("Retry-After")))
        if error.code in HOPELESS or error.code < 400:
            return ConfigError(
                f"{self.url} refuses: {what}", where=self.where,
                fix=f"check the URL, the model and the API key ({self.where}, and the variable of its key_env); "
                "what was answered so far is kept",
            )  # fmt: skip
        return Unanswered(what)

    def _clean(self, text: str) -> str:
        """A text without the API key, which some servers repeat."""
        key = os.environ.get(self.key_env, "") if self.key_env else ""
        return text.replace(key, "…") if key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Later(Exception):
    """No reply now; `seconds`: when the endpoint wants to be asked again, if it said."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


def ask_all(tasks: Iterable[Task], ask: Callable[[Task], T], at_once: int) -> Iterator[tuple[Task, T | Unanswered]]:
    """(task, result) as they come, with `at_once` under way. Raises what `ask` raises, but for Unanswered.

    When several in a row are unanswered, the endpoint is taken to be gone and the others are not asked.
    """
    waiting = iter(tasks)
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        while (item := todo.get()) is not None:
            try:
                done.put((item[0], ask(item[0]), None))
            except BaseException as error:  # raised where the results are read
                done.put((item[0], None, error))

    # Daemons: Ctrl-C does not wait for replies that are under way.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    under_way = unanswered = 0
    try:
        while True:
            while under_way < at_once and unanswered < IN_A_ROW and (task := next(waiting, _END)) is not _END:
                todo.put((task,))
                under_way += 1
            if not under_way:
                break
            task, result, error = done.get()
            under_way -= 1
            if error is None:
                unanswered = 0
                yield task, result
            elif isinstance(error, Unanswered):
                unanswered += 1
                last = error
                yield task, error
            else:
                raise error
    finally:
        for _ in threads:
            todo.put(None)
    for task in waiting:
        yield task, Unanswered(f"not asked, after {IN_A_ROW} in a row got no reply: {last}")


_END: Any = object()


def _parse(body: bytes) -> Reply:
    """Raises ValueError for what is no chat completion."""
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        text = choice["message"]["content"]
        usage = found.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError(body[:200].decode("utf-8", "replace")) from None
    if not isinstance(text, str):
        raise ValueError("its content is no text")
    return Reply(text, choice.get("finish_reason") != "length", *counts)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_PAUSE)


def _check_key(variable: str, url: str, where: str) -> None:
    if not os.environ.get(variable):
        raise ConfigError(
            f"the environment variable {variable} is not set", where=where, expected="the API key of the endpoint",
            fix=f"export {variable}=…, or drop the key that names it",
        )  # fmt: skip
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        log.warning("the API key of %s is sent without encryption; https protects it", parts.hostname)

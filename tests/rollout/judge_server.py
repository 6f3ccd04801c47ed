"""A local OpenAI-compatible server that answers as a test says: real HTTP, on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict, int], Any]
"""(request, number of this request) → text of the reply, or one of the faults below."""


@dataclass
class Status:
    """An HTTP error."""

    code: int
    headers: dict[str, str] = field(default_factory=dict)
    text: str = "no"


@dataclass
class Raw:
    """A body that is no chat completion."""

    body: bytes
    declared: int | None = None  # its Content-Length, if that is a lie


@dataclass
class Silence:
    """No reply within any test's patience."""


@dataclass
class Server:
    url: str
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def serving(answer: Answer, model: str = "judge", port: int = 0) -> Iterator[Server]:
    """A server for the block, on a free port unless one is given; `Server.url` is URL#MODEL."""
    lock, under_way, closed = threading.Lock(), [0], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.requests.append(request)
                server.headers.append(dict(self.headers))
                server.paths.append(self.path)
                number = len(server.requests)
                under_way[0] += 1
                server.most_at_once = max(server.most_at_once, under_way[0])
            try:
                self._reply(answer(request, number))
            finally:
                with lock:
                    under_way[0] -= 1

        def _reply(self, found: Any) -> None:
            if isinstance(found, Silence):
                closed.wait(30)
                return
            if isinstance(found, Status):
                self.send_response(found.code)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(found.text.encode())
                return
            body = found.body if isinstance(found, Raw) else completion(found)
            declared = found.declared if isinstance(found, Raw) and found.declared else len(body)
            self.send_response(200)
            self.send_header("Content-Length", str(declared))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_port}/v1#{model}")
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        closed.set()
        http.shutdown()
        http.server_close()


def completion(text: str) -> bytes:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()

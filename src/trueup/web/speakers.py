"""Models that pages talk to: each base with its adapters is a `trueup serve` of its own, on the loopback address, with
a token. It ends with the studio, whose end of its standard input it holds; to unload a model is to end its process.
Torch-free.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from trueup.config.schema import default
from trueup.errors import ConfigError, ModelError
from trueup.training.run_files import read_config
from trueup.web.jobs import command, environment
from trueup.web.workspace import Workspace

_SERVING = re.compile(r"serving .* on (http://\S+)/v1$")
_LET_GO_SECONDS = 5.0
_SECONDS = httpx.Timeout(600.0, connect=10.0)
_FINISH = {"length": "length"}  # everything else is an end of the model's own


@dataclass(frozen=True)
class Voice:
    """Somebody who answers.

    Attributes:
        key: what an address calls it. name: what people read.
        url, model, token: how it is asked.
        beta: of the preference that its adapter learnt; None for a base, and behind a URL of elsewhere.
        home: the process that it belongs to, by number.
    """

    key: str
    name: str
    url: str
    model: str
    token: str | None = field(default=None, repr=False)
    beta: float | None = None
    home: int | None = None


@dataclass(frozen=True)
class Piece:
    """Some more of an answer; `finish` with the last: stop or length."""

    text: str = ""
    finish: str | None = None
    tokens: int | None = None


class Loaded:
    """A base with adapters in a process of its own.

    Attributes:
        state: loading, ready, failed (and then why), ended.
    """

    def __init__(self, number: int, base: str, adapters: Mapping[str, Path], words: Sequence[str], root: Path) -> None:
        self.number, self.base, self.adapters = number, base, dict(adapters)
        self.state, self.reason, self.url = "loading", "", ""
        self.since = time.time()
        self.voices: list[Voice] = []
        self.said: deque[str] = deque(maxlen=200)
        self._token = secrets.token_urlsafe(32)
        told = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
        options = ["--port", "0", "--host", "127.0.0.1", "--while-stdin", "--drain", "1"]
        self._process = subprocess.Popen(
            command(["serve", *words, *told, *options]), cwd=root, env={**environment(), "API_KEY": self._token},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
            text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        threading.Thread(target=self._listen, name="trueup-listen", daemon=True).start()

    @property
    def alive(self) -> bool:
        return self.state in ("loading", "ready")

    @property
    def memory(self) -> int:
        """Bytes that the process holds."""
        try:
            return psutil.Process(self._process.pid).memory_info().rss
        except psutil.Error:
            return 0

    @property
    def last_words(self) -> str:
        """What it said last."""
        return self.said[-1] if self.said else ""

    def unload(self) -> None:
        """End the process, and wait until its memory is free."""
        if self.alive:
            self.state = "ended"
        self._process.terminate()
        try:
            self._process.wait(_LET_GO_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> None:
        """Until it ends: what it says, and when it is ready."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            line = line.rstrip()
            if match := _SERVING.search(line):
                self.url = f"{match[1]}/v1"
                self._find_voices()
            elif line:
                self.said.append(line)
        self._process.wait()
        if self.alive:
            self.state, self.reason = "failed", self._why()

    def _find_voices(self) -> None:
        try:
            listed = httpx.get(f"{self.url}/models", headers=_headers(self._token), trust_env=False, timeout=30).json()
        except (httpx.HTTPError, ValueError) as error:
            self.said.append(f"error: {error}")
            self.unload()
            self.state, self.reason = "failed", self._why()
            return
        self.voices = [self._voice(str(card["id"])) for card in listed["data"]]
        self.voices.sort(key=lambda voice: voice.beta is not None)
        self.state = "ready"

    def _voice(self, model: str) -> Voice:
        adapter = self.adapters.get(model)
        beta = beta_of(adapter) if adapter else None
        return Voice(model, model, self.url, model, self._token, beta, self.number)

    def _why(self) -> str:
        lines = list(self.said)
        starts = [number for number, line in enumerate(lines) if line.startswith("error")]
        told = "\n".join(lines[starts[-1] :] if starts else lines[-3:]).removeprefix("error: ")
        return told or f"its process ended ({self._process.returncode})"


class Speakers:
    """What is loaded in a studio: the same for every tab."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.loaded: list[Loaded] = []
        self._numbers = 0
        self._lock = threading.Lock()

    def load(self, base: str, adapters: Sequence[str], words: Sequence[str], *, keep: bool = False) -> Loaded:
        """Begin to load a base with adapters beside it.

        Args:
            adapters: directories, as configs name them. words: keys of the model.
            keep: let the models that are loaded stay; else they are unloaded first.

        Raises:
            ConfigError: that base is to stay, and is loaded already.
        """
        with self._lock:
            if keep and any(one.alive and one.base == base for one in self.loaded):
                raise ConfigError(f"{base} is loaded already", fix="unload it; adapters of one base load together")
            for one in self.loaded if not keep else [one for one in self.loaded if not one.alive]:
                one.unload()
            self.loaded = [one for one in self.loaded if one.alive]
            named = {self.name_of(path): self.workspace.root / path for path in adapters}
            self._numbers += 1
            self.loaded.append(Loaded(self._numbers, base, named, words, self.workspace.root))
            return self.loaded[-1]

    def unload(self, number: int) -> None:
        """End a model's process. Nothing happens if it has ended."""
        with self._lock:
            for one in self.loaded:
                if one.number == number:
                    one.unload()
            self.loaded = [one for one in self.loaded if one.number != number]

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            for one in self.loaded:
                one.unload()
            self.loaded = []

    def voices(self) -> list[Voice]:
        """Everybody who is loaded and ready."""
        return [voice for one in self.loaded if one.state == "ready" for voice in one.voices]

    def name_of(self, adapter: str) -> str:
        """What an adapter is called: its run, and its checkpoint."""
        return adapter.removeprefix("./").removeprefix("saves/").strip("/")


def endpoint(name: str, key_env: str | None = None) -> Voice:
    """A model behind a URL. Raises ConfigError.

    Args:
        name: URL#MODEL, with the URL up to where `/chat/completions` follows.
        key_env: environment variable with its key.
    """
    url, _, model = name.strip().partition("#")
    if not (url.startswith(("http://", "https://")) and model):
        raise ConfigError(f"{name!r} names no endpoint", expected="URL#MODEL, as in http://127.0.0.1:8000/v1#qwen")
    if key_env and not (key_env.endswith("_API_KEY") and key_env.isidentifier()):
        raise ConfigError(f"{key_env!r} holds no key of an endpoint", expected="a variable whose name ends in _API_KEY")
    if key_env and key_env not in os.environ:
        raise ConfigError(f"{key_env} is not set where the studio was started")
    return Voice(name.strip(), model, url.rstrip("/"), model, os.environ[key_env] if key_env else None)


def beta_of(adapter: Path) -> float:
    """The β with which an adapter was trained."""
    for place in (adapter, adapter.parent):
        beta = read_config(place).get("pref_beta")
        if isinstance(beta, int | float):
            return float(beta)
    return float(default("pref_beta"))


def base_of(adapter: Path) -> str | None:
    """The model that an adapter belongs to, as its run named it."""
    for place in (adapter, adapter.parent):
        if name := read_config(place).get("model_name_or_path"):
            return str(name)
    try:
        return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError):
        return None


async def answer(
    voice: Voice, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]
) -> AsyncIterator[Piece]:
    """A voice's next turn, in pieces as they come. Whoever stops listening stops it. Raises ModelError."""
    body = {"model": voice.model, "messages": list(messages), "stream": True, **sampling}
    ours = voice.home is not None
    if ours:
        body["stream_options"] = {"include_usage": True}
    async with _client(voice) as client:
        try:
            async with client.stream("POST", "/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ModelError(_reason(response.status_code, await response.aread()))
                async for line in response.aiter_lines():
                    if piece := _piece(line):
                        yield piece
        except httpx.HTTPError as error:
            raise ModelError(f"{voice.name} does not answer: {error or type(error).__name__}") from error


async def worth(
    policy: Voice, reference: Voice, messages: Sequence[Mapping[str, str]], beta: float, complete: bool
) -> tuple[float, list[dict[str, Any]]]:
    """(β (log π − log π_ref) of the last turn, its tokens with both log-probabilities). Raises ModelError."""
    body = {
        "model": policy.model, "reference": reference.model, "messages": list(messages), "beta": beta,
        "logprobs": True, "complete": complete,
    }  # fmt: skip
    async with _client(policy) as client:
        try:
            response = await client.post("/score", json=body)
        except httpx.HTTPError as error:
            raise ModelError(f"{policy.name} does not answer: {error or type(error).__name__}") from error
    if response.status_code != 200:
        raise ModelError(_reason(response.status_code, response.content))
    (found,) = response.json()["data"]
    return float(found["score"]), found["tokens"]


def _client(voice: Voice) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=voice.url, headers=_headers(voice.token), timeout=_SECONDS, follow_redirects=False,
        trust_env=voice.home is None,
    )  # fmt: skip


def _headers(token: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def _piece(line: str) -> Piece | None:
    """What an event of a stream says; None if nothing that is shown. Raises ModelError."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    try:
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise ModelError(_reason(500, line.removeprefix("data: ").encode()))
        if not chunk.get("choices"):
            return Piece(tokens=chunk["usage"]["completion_tokens"]) if chunk.get("usage") else None
        choice = chunk["choices"][0]
        finish = choice.get("finish_reason")
        text = (choice.get("delta") or {}).get("content") or ""
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelError("the answer is not as OpenAI's protocol has it") from None
    return Piece(text, _FINISH.get(finish, "stop") if finish else None) if text or finish else None


def _reason(status: int, body: bytes) -> str:
    """OpenAI's error shape in a sentence."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the answer is {status}"

"""Who says what an answer is worth: functions in a process of their own, a reward model, an HTTP scorer."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trueup.errors import ConfigError, DataError, ResourceError
from trueup.rollout.worker import Refused, call

log = logging.getLogger("trueup")

Scores = list[float | None]


@dataclass(frozen=True)
class Answered:
    """An answer as rewards see it. `columns`: the whole row of the dataset, under its own names."""

    row: str
    prompt: str  # what is asked last
    completion: str
    text: str  # the whole conversation as the model sees it
    columns: Mapping[str, Any] = field(default_factory=dict)


class Reward(Protocol):
    """A source of numbers; None where it has no opinion."""

    name: str

    def score(self, answers: Sequence[Answered]) -> Scores: ...
    def close(self) -> None: ...


class Workers:
    """The process that runs the operator's functions; started when needed, ended when late.

    Raises, while in use:
        DataError: a function raised an error, or returned something else than a number an answer.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self._loaded: set[str] = set()  # functions that the process has imported

    def check(self, function: str, key: str) -> None:
        """Whether there is such a function. Raises ConfigError."""
        if why := self._load(function):
            raise ConfigError(f"{function}: {why}", where=key, expected="FILE.py:NAME or the name of a built-in reward")

    def call(self, function: str, batch: Mapping[str, Sequence[Any]]) -> Scores:
        """The function's values. A batch that takes too long is cut in half, until it is known which answer does."""
        size = len(batch["completions"])
        if why := self._load(function):
            raise DataError(f"{function}: {why}", where=function, fix="mend the function, then resume")
        reply = self._ask({"function": function, "batch": batch}, self.seconds)
        if reply is None:
            if size == 1:
                log.warning("%s took more than %g s for one answer, which has no reward", function, self.seconds)
                return [None]
            half = size // 2
            first = {key: column[:half] for key, column in batch.items()}
            second = {key: column[half:] for key, column in batch.items()}
            return self.call(function, first) + self.call(function, second)
        if "error" in reply:
            raise DataError(
                f"the reward function failed: {reply['error']}", where=function, fix="mend the function, then resume"
            )
        return reply["values"]

    def _load(self, function: str) -> str | None:
        """Import the function where it is not yet, off the clock of answers; why it cannot be had, if so."""
        if function in self._loaded:
            return None
        reply = self._ask({"function": function}, max(self.seconds, 120.0))  # its file may import much
        if reply is None:
            return "importing it takes too long, or ends the process"
        if "error" not in reply:
            self._loaded.add(function)
        return reply.get("error")

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply, None if there is none in time (the process is then ended)."""
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request, default=str) + "\n")
            process.stdin.flush()
            reply = json.loads(self._lines.get(timeout=seconds))
        except (queue.Empty, OSError, json.JSONDecodeError):  # late, or it died
            self.close()
            return None
        return reply

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, "-P", "-m", "trueup.rollout.worker"]  # -P: no module of the working directory
            # A session of its own: Ctrl-C in the terminal asks trueup to stop, and trueup ends the functions.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                start_new_session=True,
            )  # fmt: skip
            self._end = weakref.finalize(self, _end, self._process)  # however this process comes to its end
            self._lines = queue.Queue()
            threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
        return self._process

    def close(self) -> None:
        """End the process, and whatever its functions have started."""
        if self._end is not None:
            self._end()
            self._process = self._end = None
            self._loaded.clear()


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process with its whole group, and leave no zombie."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where only a zombie is left
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # a request that nobody will read
        process.stdin.close()


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    with process.stdout as output:
        for line in output:
            lines.put(line)
    lines.put("")  # it has ended: no JSON


class FunctionReward:
    """A function of the operator's, or a built-in one."""

    def __init__(self, function: str, workers: Workers) -> None:
        self.function = function
        self.name = function.rpartition(":")[2]
        self.workers = workers
        workers.check(function, "reward_funcs")

    def score(self, answers: Sequence[Answered]) -> Scores:
        return self.workers.call(self.function, as_columns(answers))

    def close(self) -> None:
        self.workers.close()


class GivenReward:
    """A function of the program that started the run, called in its process: what it raises ends the run, and nothing
    ends it when it is late.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def score(self, answers: Sequence[Answered]) -> Scores:
        try:
            return call(self.function, as_columns(answers))
        except Refused as error:
            raise DataError(str(error), where=f"reward function {self.name}") from error

    def close(self) -> None:
        pass


def as_columns(answers: Sequence[Answered]) -> dict[str, list[Any]]:
    """What functions get: `prompts`, `completions`, and every column of the rows."""
    names = dict.fromkeys(name for a in answers for name in a.columns)
    columns = {name: [a.columns.get(name) for a in answers] for name in names}
    return {**columns, "prompts": [a.prompt for a in answers], "completions": [a.completion for a in answers]}


class ModelReward:
    """A reward model. `score_texts` runs it on answers; the recipe that loaded it knows its template."""

    name = "reward_model"

    def __init__(self, score: Callable[[Sequence[Answered]], list[float]]) -> None:
        self._score = score

    def score(self, answers: Sequence[Answered]) -> Scores:
        return list(self._score(answers))

    def close(self) -> None:
        pass


class HttpReward:
    """A scorer behind a URL: POST {"model", "messages": [texts]} → {"scores": [numbers]}, as LLaMA-Factory's."""

    name = "reward_model"
    TRIES, SECONDS = 3, 60.0

    def __init__(self, url: str) -> None:
        self.url = url

    def score(self, answers: Sequence[Answered]) -> Scores:
        texts = [a.text for a in answers]
        body = json.dumps({"model": "model", "messages": texts}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(self.TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.SECONDS) as reply:
                    return self._scores(json.load(reply), len(texts))
            except (OSError, http.client.HTTPException, ValueError, TypeError) as error:
                failure = error
                time.sleep(min(2.0**attempt, 5.0) * (attempt + 1 < self.TRIES))
        raise ResourceError(
            f"the scorer does not answer: {failure}", where=f"reward_model: {self.url}",
            expected='{"scores": [a number for each text]}', fix="start it, then resume",
        )  # fmt: skip

    def _scores(self, reply: Any, count: int) -> Scores:
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list) or len(scores) != count:
            raise ValueError(f"it answered {json.dumps(reply)[:200]}")
        return [None if score is None else float(score) for score in scores]

    def close(self) -> None:
        pass

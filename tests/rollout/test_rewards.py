"""Functions in a process of their own: what they get, what they may return, what happens when they hang or fail."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

import trueup
from trueup.errors import ConfigError, DataError, ResourceError
from trueup.rollout import worker
from trueup.rollout.rewards import Answered, FunctionReward, HttpReward, Workers

FILE = """
import time
def length(completions): return [len(c) for c in completions]
def agrees(prompts, completions, answer, **rest): return [p + a == c for p, c, a in zip(prompts, completions, answer)]
def slow(completions):
    if "hang" in completions: time.sleep(60)
    return [1.0] * len(completions)
def dies(completions):
    import os
    if "die" in completions: os._exit(3)
    return [2.0] * len(completions)
def unsure(completions): return [None if c == "?" else 1 for c in completions]
def loud(completions):
    print("not an answer")
    return [0.0] * len(completions)
def wrong(completions): return 1.0
def starts_others(completions):
    import os, subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(os.environ["PIDS"], "w", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {child.pid}")
    if "hang" in completions: time.sleep(60)
    return [1.0] * len(completions)
def fails(completions): return [1 / 0 for c in completions]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.fixture
def workers():
    made = Workers(seconds=1.0)
    yield made
    made.close()


def answered(*texts: str, **columns) -> list[Answered]:
    rows = [{key: values[i] for key, values in columns.items()} for i in range(len(texts))]
    return [
        Answered(f"d:{i}", "q", text, f"q{text}", row) for i, (text, row) in enumerate(zip(texts, rows, strict=True))
    ]


def test_a_function_gets_what_it_has_parameters_for(file, workers):
    assert FunctionReward(f"{file}:length", workers).score(answered("a", "bcd", x=[1, 2])) == [1.0, 3.0]
    assert FunctionReward(f"{file}:agrees", workers).score(answered("qa", "b", answer=["a", "a"])) == [1.0, 0.0]


def test_none_is_no_opinion_and_prints_are_no_answers(file, workers):
    assert FunctionReward(f"{file}:unsure", workers).score(answered("?", "a")) == [None, 1.0]
    assert FunctionReward(f"{file}:loud", workers).score(answered("a")) == [0.0]


def test_an_answer_that_takes_too_long_has_no_reward_and_the_others_have(file, workers, caplog):
    texts = ["a", "b", "hang", "c"]
    assert FunctionReward(f"{file}:slow", workers).score(answered(*texts)) == [1.0, 1.0, None, 1.0]
    assert "more than 1 s for one answer" in caplog.text


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped by init does not."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def soon_dead(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are POSIX")
@pytest.mark.parametrize("text", ["hang", "a"])
def test_what_a_function_has_started_ends_with_it(file, workers, tmp_path, monkeypatch, text):
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    scores = FunctionReward(f"{file}:starts_others", workers).score(answered(text))
    assert scores == ([None] if text == "hang" else [1.0])
    workers.close()
    worker_pid, child = map(int, (tmp_path / "pids").read_text(encoding="utf-8").split())
    assert soon_dead([worker_pid, child])
    assert not psutil.pid_exists(worker_pid)  # ours, and reaped


RUNS_WORKERS = """
import sys
from trueup.rollout.rewards import Workers
workers = Workers(seconds=60)
print("ready", flush=True)
workers.call(sys.argv[1], {"completions": ["hang"]})
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_function_that_hangs_ends_with_the_run(file, tmp_path, how):
    pids = tmp_path / "pids"
    environment = {**os.environ, "PIDS": str(pids), "PYTHONPATH": str(Path(trueup.__file__).parents[1])}
    command = [sys.executable, "-c", RUNS_WORKERS, f"{file}:starts_others"]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pids.is_file() and len(pids.read_text(encoding="utf-8").split()) == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = [int(pid) for pid in pids.read_text(encoding="utf-8").split()]
    run.send_signal(how)
    run.communicate(timeout=30)
    assert soon_dead(found)


def test_importing_the_file_again_is_not_counted(tmp_path, workers):
    path = tmp_path / "heavy.py"
    path.write_text("import time\ntime.sleep(1.5)\n" + FILE, encoding="utf-8")
    assert FunctionReward(f"{path}:slow", workers).score(answered("hang", "a")) == [None, 1.0]


def test_modules_of_the_working_directory_are_not_taken(file, workers, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit('not this one')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(Path(trueup.__file__).parents[1]))
    monkeypatch.chdir(elsewhere)
    assert FunctionReward(f"{file}:length", workers).score(answered("a")) == [1.0]


def test_a_reward_that_needs_a_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(worker.Refused, match=r"trueup\[rewards\]"):
        worker.find("json_schema")


def test_an_answer_that_ends_the_process_has_no_reward(file, workers):
    assert FunctionReward(f"{file}:dies", workers).score(answered("a", "die")) == [2.0, None]


def test_errors_of_a_function_stop_the_run_and_name_the_line(file, workers):
    with pytest.raises(DataError, match=r"ZeroDivisionError.*rewards\.py, line \d+"):
        FunctionReward(f"{file}:fails", workers).score(answered("a"))
    with pytest.raises(DataError, match="returned float for 1 answers"):
        FunctionReward(f"{file}:wrong", workers).score(answered("a"))
    with pytest.raises(DataError, match="agrees wants answer; rows have completions, prompts"):
        FunctionReward(f"{file}:agrees", workers).score(answered("a"))


@pytest.mark.parametrize(
    "name, why",
    [
        ("{}:nothing", "has no function 'nothing'"),
        ("nowhere.py:f", "there is no file"),
        ("exact", "exact_match"),
        ("{}", "names no function"),
    ],
)
def test_a_function_that_is_not_there_is_an_error_before_the_run(file, workers, name, why):
    with pytest.raises(ConfigError, match=why):
        FunctionReward(name.format(file), workers)


def test_a_name_is_parted_into_file_and_function_on_every_system():
    windows = "C:\\rewards\\mine.py"
    assert worker.file_and_function(f"{windows}:score") == (windows, "score")
    assert worker.file_and_function(windows) == (windows, "")
    assert worker.file_and_function("numeric") == ("", "numeric")


def test_built_in_rewards_go_by_name(workers):
    assert FunctionReward("numeric", workers).score(answered("so 42", "41", answer=["42", 42])) == [1.0, 0.0]


class Scorer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = json.dumps({"scores": [len(text) for text in request["messages"]]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_) -> None:
        pass


def test_a_scorer_behind_a_url_gets_whole_texts(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Scorer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    assert HttpReward(url).score(answered("a", "bcd")) == [2.0, 4.0]
    server.shutdown()
    server.server_close()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ResourceError, match="the scorer does not answer"):
        HttpReward(url).score(answered("a"))


@pytest.mark.parametrize("error", [http.client.IncompleteRead(b""), ConnectionResetError(), TypeError("no number")])
def test_a_scorer_that_breaks_off_is_asked_again_then_named(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ResourceError, match="the scorer does not answer"):
        HttpReward("http://127.0.0.1:9/").score(answered("a"))


def test_a_score_of_null_is_no_opinion():
    assert HttpReward("")._scores({"scores": [None, 2]}, 2) == [None, 2.0]

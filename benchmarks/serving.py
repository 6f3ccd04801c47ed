"""Tokens a second and time to the first token of `trueup serve` and of LLaMA-Factory's server, at 1, 8 and 32 clients.

    python -m benchmarks.serving --threads 1 --rounds 3

Both serve the built-in model in bf16 with the same template; greedy answers, streamed, to questions of the bundled
data, each asked once; every client asks its next when its last is answered. Tokens are those of the answers' text, and
how many answers are the same to the letter says whether it was the same work. LLaMA-Factory answers one request at a
time unless MAX_CONCURRENT says otherwise (`llamafactory-32`); each of ours has 32 slots, as installed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from tokenizers import Tokenizer

from benchmarks import machine
from benchmarks.environments import RECIPES, python_of, versions_of
from benchmarks.measure import RESULTS, WORK, Failed, argv, environment, result_path, spread, write_result
from benchmarks.measure import table as as_table
from trueup.builtin import BUILTIN_DATA, builtin_path

MODEL, TEMPLATE = "builtin:sql-tiny", "chatml"
CLIENTS = {1: 8, 8: 24, 32: 32}  # clients → answers in all
LONGEST = 64  # tokens of an answer
TOOLS: dict[str, dict[str, str]] = {"trueup": {}, "llamafactory": {}, "llamafactory-32": {"MAX_CONCURRENT": "32"}}


@dataclass(frozen=True)
class Answered:
    """One streamed answer; times are those of `time.perf_counter`."""

    question: int
    text: str
    asked: float
    first: float
    ended: float


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="threads of each server; its own choice when unset")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args(words)
    env = environment(threads=options.threads)
    tools = options.tools.split(",")
    peers = {"llamafactory": versions_of("llamafactory")} if any(t != "trueup" for t in tools) else {}
    record: dict[str, Any] = {
        "argv": argv(words), "machine": machine.describe(env), "versions": peers, "threads": options.threads,
        "work": {"longest": LONGEST, "answers": {str(count): answers for count, answers in CLIENTS.items()}},
        "runs": [],
    }  # fmt: skip
    print(machine.in_words(record["machine"]))
    path = result_path("serving", options.results)
    for number in range(options.rounds):
        for tool in tools[:: -1 if number % 2 else 1]:
            try:
                for found in measure(tool, env):
                    print(f"  round {number + 1}: {tool}, {found['clients']} clients: {found['rate']:.0f} tokens/s")
                    record["runs"].append({"round": number, "tool": tool, **found})
            except Failed as error:
                print(error, file=sys.stderr)
            write_result(path, "serving", record)
    print(f"\n{summary(record)}\n\n{path}")


# --- servers ----------------------------------------------------------------------------------


def measure(tool: str, env: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A fresh server, warmed up, with more and more clients; its peak memory is in the last result."""
    asked = questions(1 + sum(CLIENTS.values()))
    with serving(tool, env) as (port, process):
        asyncio.run(clients(port, asked[:1], 1))
        at = 1
        for count, answers in CLIENTS.items():
            found = asyncio.run(clients(port, asked[at : at + answers], count))
            at += answers
            yield {"clients": count, **measured(found), "peak_gb": peak_gb(process.pid)}


@contextmanager
def serving(tool: str, env: Mapping[str, str]) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """(port, process) of a server that answers. Raises Failed."""
    directory = WORK / "serving"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command, more = (ours if tool == "trueup" else llamafactory)(port)
    log = directory / f"{tool}.txt"
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**env, **more, **TOOLS[tool]}, cwd=directory
        )
        try:
            wait_for(port, process, log)
            yield port, process
        finally:
            process.terminate()
            process.wait(60)


def ours(port: int) -> tuple[list[str], dict[str, str]]:
    model = ["--model_name_or_path", MODEL, "--template", TEMPLATE]
    return [sys.executable, "-m", "trueup", "serve", *model, "--port", str(port)], {}


def llamafactory(port: int) -> tuple[list[str], dict[str, str]]:
    command = [
        str(python_of("llamafactory")), "-m", "llamafactory.cli", "api", "--model_name_or_path",
        str(builtin_path(MODEL)), "--template", TEMPLATE, "--infer_backend", "huggingface", "--infer_dtype", "bfloat16",
    ]  # fmt: skip
    more = {"API_HOST": "127.0.0.1", "API_PORT": str(port), "API_VERBOSE": "0"}
    return command, {**RECIPES["llamafactory"].variables, **more}


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 120.0) -> None:
    """Until `/v1/models` answers. Raises Failed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    text = log.read_text(encoding="utf-8", errors="replace")[-1500:]
    raise Failed(f"the server does not answer; {log} ends with\n{text}")


def peak_gb(pid: int) -> float | None:
    """The most resident memory that a process has had, GiB; None where the kernel does not tell."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in text.splitlines() if line.startswith("VmHWM")), None)


# --- clients ----------------------------------------------------------------------------------


def questions(count: int) -> list[str]:
    """Different ones, from the bundled data."""
    with open(BUILTIN_DATA / "sql_pairs.jsonl", encoding="utf-8") as lines:
        found = list(dict.fromkeys(json.loads(line)["instruction"] for line in lines))
    return found[:count]


async def clients(port: int, asked: Sequence[str], count: int) -> list[Answered]:
    """All questions' answers, `count` under way at a time."""
    left = iter(enumerate(asked))

    async def client() -> list[Answered]:
        return [await ask(port, number, text) for number, text in left]

    return [one for some in await asyncio.gather(*(client() for _ in range(count))) for one in some]


async def ask(port: int, number: int, question: str) -> Answered:
    """A streamed answer, over a connection of its own: clients' libraries would take the servers' time."""
    body = json.dumps(
        {
            "model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": LONGEST, "stream": True,
        }
    ).encode()  # fmt: skip
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    first, text = 0.0, ""
    async for line in reader:
        if not line.startswith(b"data: {"):
            if line.strip() == b"data: [DONE]":
                break
            continue
        for choice in json.loads(line[6:])["choices"]:
            if said := choice["delta"].get("content"):
                first = first or time.perf_counter()
                text += said
    ended = time.perf_counter()
    writer.close()
    if not text:
        raise Failed("an answer is empty")
    return Answered(number, text, begun, first, ended)


def measured(answers: Sequence[Answered]) -> dict[str, Any]:
    """Tokens a second of all together, from the first question to the last answer; times to first tokens in s."""
    span = max(one.ended for one in answers) - min(one.asked for one in answers)
    waits = [one.first - one.asked for one in answers]
    tokens = sum(map(tokens_of, (one.text for one in answers)))
    return {
        "rate": tokens / span, "tokens": tokens, "seconds": span, "first_p50": median(waits),
        "first_p95": quantiles(waits, n=20, method="inclusive")[-1],
        "texts": [one.text for one in sorted(answers, key=lambda one: one.question)],
    }  # fmt: skip


def tokens_of(text: str) -> int:
    return len(tokenizer().encode(text).ids)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(builtin_path(MODEL) / "tokenizer.json"))


def summary(record: dict[str, Any]) -> str:
    """A line for every number of clients and tool, and how many answers are the same as ours."""
    runs = record["runs"]
    lines = []
    kinds = {(r["clients"], r["tool"]) for r in runs}
    for clients_, tool in sorted(kinds, key=lambda kind: (kind[0], list(TOOLS).index(kind[1]))):
        mine = [r for r in runs if (r["clients"], r["tool"]) == (clients_, tool)]
        base = {r["round"]: r for r in runs if (r["clients"], r["tool"]) == (clients_, "trueup")}
        pairs = [(r, base[r["round"]]) for r in mine if tool != "trueup" and r["round"] in base]
        lines.append(
            (
                f"{clients_}: {tool}",
                spread([r["rate"] for r in mine], 0),
                spread([1e3 * r["first_p50"] for r in mine], 0),
                f"{1e3 * median(r['first_p95'] for r in mine):.0f}",
                f"{max(r['peak_gb'] or 0.0 for r in mine):.2f}",
                f"{median(ours_['rate'] / r['rate'] for r, ours_ in pairs):.1f}" if pairs else "",
            )
        )
    text = as_table(("clients", "tokens/s", "first ms", "p95", "GiB", "ours ×"), lines)
    return f"{text}\n\n{sameness(runs)}"


def sameness(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many answers are ours to the letter."""
    ours_ = {(r["round"], r["clients"]): r["texts"] for r in runs if r["tool"] == "trueup"}
    pairs = [
        (a, b)
        for r in runs if r["tool"] != "trueup" and (r["round"], r["clients"]) in ours_
        for a, b in zip(r["texts"], ours_[r["round"], r["clients"]], strict=True)
    ]  # fmt: skip
    same = sum(a.strip() == b.strip() for a, b in pairs)
    return f"{same} of {len(pairs)} answers are the same as ours to the letter" if pairs else "no peer was measured"


if __name__ == "__main__":
    main()

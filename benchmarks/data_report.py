"""The data report of 100,000 pairs no two texts of which are equal, and the same again from the cache.

    python -m benchmarks.data_report

Dialogues in the shapes of HH-RLHF, every turn's and answer's text put together anew from sentences of English real
sets until it is as long as the one it stands for. `trueup data check` with Qwen's tokenizer, as a whole process: from
before it exists to its end, with everything it imports, report and page written. The first start finds an empty cache,
the second what the first has kept, and one more only its tokens, so that it makes the report again. The same for ten
of the pairs tells what imports and the tokenizer take.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.measure import HOME, RESULTS, WORK, argv, environment, result_path, run, spread, table, write_result
from benchmarks.models import model_directory
from benchmarks.workloads import DATA, Pair, Turn, dialogues, english, read_json_lines

LIMITS = {"first start": 60.0, "second start": 3.0}  # seconds of the whole process
FEW, TOKENS = "ten pairs", "from the tokens"
FILE = "pairs.jsonl"
_SENTENCE = re.compile(r"[^\s].*?[.!?](?=\s|$)", re.DOTALL)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_report")
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    found = machine.describe(environment())
    print(machine.in_words(found))
    file = pairs_file(options.pairs, options.data)
    record = {
        "argv": argv(words),
        "machine": found,
        "pairs": options.pairs,
        "megabytes": round(file.stat().st_size / 1e6, 1),
        **measure(file, options.rounds),
    }
    path = result_path("data-report", options.results)
    write_result(path, "data-report", record)
    print(f"\n{summary(record)}\n\n{path}")


def measure(file: Path, rounds: int) -> dict[str, Any]:
    """Seconds and largest memory of each start, and the mean lengths that the report found."""
    cache, few, model = WORK / "cache", WORK / FILE, model_directory("0.5b")
    WORK.mkdir(parents=True, exist_ok=True)
    with file.open(encoding="utf-8") as lines:
        few.write_text("".join(islice(lines, 10)), encoding="utf-8")

    def command(data: Path) -> list[str | Path]:
        return [
            sys.executable, "-m", "trueup", "--json", "data", "check", data, "--html", WORK / "report.html", "--force",
            "--model_name_or_path", model, "--cutoff_len", "1024",
        ]  # fmt: skip

    commands = {FEW: command(few), **dict.fromkeys([*LIMITS, TOKENS], command(file))}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peak: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for name, words in commands.items():
            if name == TOKENS:
                shutil.rmtree(cache / "reports")
            usage = run(words, WORK / "out.txt", environment({"TRUEUP_CACHE": str(cache)}))
            seconds[name].append(usage.process_seconds)
            peak[name].append(usage.peak_gb)
            print(f"  {name}: {usage.process_seconds:.2f} s, {usage.peak_gb:.2f} GiB", flush=True)
    shutil.rmtree(cache, ignore_errors=True)
    said = (WORK / "out.txt").read_text(encoding="utf-8")
    answer, _ = json.JSONDecoder().raw_decode(said, said.index("{"))
    tokens = {part: stats["mean"] for part, stats in answer["result"]["tokens"].items()}
    return {"seconds": seconds, "peak_gb": peak, "mean_tokens": tokens}


def summary(record: dict[str, Any]) -> str:
    tokens = ", ".join(f"{part} {mean:.0f}" for part, mean in record["mean_tokens"].items())
    rows = [
        (
            name,
            spread(seconds, 1),
            f"{LIMITS[name]:.0f}" if name in LIMITS else "",
            f"{max(record['peak_gb'][name]):.1f}",
        )
        for name, seconds in record["seconds"].items()
    ]
    head = f"{record['pairs']:,} pairs, {record['megabytes']:.0f} MB; mean tokens:\n{tokens}"
    return f"{head}\n\n{table(('trueup data check', 's', 'allowed', 'GiB'), rows)}"


# --- the pairs --------------------------------------------------------------------------------


def pairs_file(pairs: int, data: Path) -> Path:
    """The file of so many pairs, made if it is not there: the same whenever it is made."""
    file = HOME / "data" / f"report-{pairs}" / FILE
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as staged:
            staged.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(pairs, data))
        Path(staged.name).rename(file)
    return file


def rows(pairs: int, data: Path) -> Iterator[dict[str, Any]]:
    """Pairs in the shapes of HH's, no two texts of them equal."""
    texts = Texts(sentences(data))
    shapes = list(dialogues(data, None))  # type: ignore[arg-type]
    for shape in islice(cycle(shapes), pairs):
        prompt: list[Turn] = [{**turn, "content": texts.like(turn["content"])} for turn in shape.prompt]
        chosen, rejected = ([{"role": "assistant", "content": texts.like(t)}] for t in (shape.chosen, shape.rejected))
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def sentences(data: Path) -> list[str]:
    """Every sentence of the English real sets, once."""
    pairs: list[Pair] = [*english(data, None), *dialogues(data, None)]  # type: ignore[arg-type]
    pages = [row["text"] for row in read_json_lines(data / "c4_demo.jsonl")]
    texts = [text for p in pairs for text in (*(turn["content"] for turn in p.prompt), p.chosen, p.rejected)]
    return list(dict.fromkeys(found for text in (*texts, *pages) for found in _SENTENCE.findall(text)))


class Texts:
    """New texts of sentences, each given out once."""

    def __init__(self, sentences: Sequence[str]) -> None:
        self._random = random.Random(0)
        self._sentences = sentences
        self._given: set[str] = set()

    def like(self, text: str) -> str:
        """A new one about as long as `text`: whole sentences, and words of a last one."""
        for tries in count():
            parts: list[str] = []
            room = len(text) * self._random.uniform(0.8, 1.15) + 3 + tries  # short ones run out
            while room > 0:
                sentence = self._random.choice(self._sentences)
                parts.append(sentence if len(sentence) <= room else _words(sentence, room))
                room -= len(parts[-1]) + 1
            made = " ".join(parts)
            if made not in self._given:
                self._given.add(made)
                return made
        raise AssertionError("there is always a longer one")


def _words(sentence: str, room: float) -> str:
    """The first words of a sentence, one at least, in at most `room` characters."""
    cut = sentence[: int(room) + 1].rsplit(None, 1)[0]
    return cut if cut and len(cut) <= room else sentence.split()[0]


if __name__ == "__main__":
    main()

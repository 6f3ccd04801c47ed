"""Memory stays flat however much is streamed: on gigabytes, and on millions of rows."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = ("Saturday", "because", "rain", "a", "of", "preference", "the", "answers", "people", "better", "why", "is")
#: Reads one pass through a file, in a process of its own; prints a line of (rows read, MB resident) a buffer.
READER = """
import resource, sys, time
import psutil
from tests.data.tiny_tokenizers import make_tokenizer
from trueup.config.load import load_config
from trueup.data.encode import prepare

path, output, size, stage = sys.argv[1:]
cfg = load_config({"model_name_or_path": "builtin:sql-tiny", "stage": stage, "dataset": path, "output_dir": output,
                   "streaming": True, "max_steps": 1, "template": "qwen", "buffer_size": int(size)})
begun = time.monotonic()
prepared = prepare(cfg, make_tokenizer("qwen"))
stream, report = prepared.stream, prepared.report
while stream.state()["begins"]["place"]["pass"] == 0:
    (entry,) = report.datasets.values()
    seconds = time.monotonic() - begun
    print(entry.read, entry.kept, psutil.Process().memory_info().rss >> 20, round(entry.read / seconds), flush=True)
    stream.advance()
stream.close()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def write_rows(path: Path, size: int, words: int, stage: str) -> int:
    """At least `size` bytes of pairs or documents, each text of about `words` words, no two alike; their number."""
    draw, count = random.Random(0), 0
    text = [" ".join(draw.choices(WORDS, k=max(1, draw.randint(words // 2, words * 3 // 2)))) for _ in range(2000)]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            lines = []
            for _ in range(1000):
                prompt, chosen, rejected = draw.choices(text, k=3)
                row = {"prompt": f"{count} {prompt}", "chosen": chosen, "rejected": f"{rejected} {count}"}
                lines.append(json.dumps(row if stage == "dpo" else {"text": row["prompt"]}) + "\n")
                count += 1
            file.writelines(lines)
    return count


@pytest.mark.prove
@pytest.mark.parametrize(
    ("size", "words", "stage"),
    [(2 * 2**30, 90, "dpo"), (170 * 2**20, 3, "pt")],  # documents, which take half the time of pairs
    ids=["2 GB", "5 million rows"],
)
def test_memory_is_flat(tmp_path: Path, size: int, words: int, stage: str):
    count = write_rows(tmp_path / "rows.jsonl", size, words, stage)
    command = [sys.executable, "-c", READER, str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "16384", stage]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, peak = done.stdout.splitlines()
    table = [tuple(map(int, line.split())) for line in lines]
    beginning, end = ([megabytes for *_, megabytes, _ in part] for part in (table[: len(table) // 10], table[-5:]))
    print(f"{count:,} rows, {size >> 20:,} MB: {table[-1][3]:,} rows/s; resident in the first tenth up to "
          f"{max(beginning)} MB, in the end up to {max(end)} MB, peak {peak} MB")  # fmt: skip
    assert table[-1][0] == table[-1][1] == count
    assert max(end) < 1.1 * max(beginning)
    assert int(peak) < 2 * max(beginning)

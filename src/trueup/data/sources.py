"""Rows from wherever they are: files of six types, folders, globs, URLs and hubs; and how datasets
mix.

A row is a dict, exactly as the file has it: nothing is coerced here. Rows remember the file and
line they came from, so that every later complaint can point there. Faults in a file's syntax are
always errors, all of them at once (up to ten are shown): a file that is half read is worse than one
that is refused.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import logging
import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trueup.data import jsontext
from trueup.data.jsontext import JsonFault
from trueup.data.registry import FILE_SUFFIXES, REGISTRY_NAMES, DatasetSpec, missing_path
from trueup.data.store import find_copy
from trueup.errors import ConfigError, DataError, ModelError, Problem

log = logging.getLogger("trueup")

Row = dict[str, Any]
_SHOWN = 10  # faults listed per file; the rest is counted
_IN_FULL = 3
_SAMPLE = 64 * 1024  # bytes looked at to guess an encoding
_LONG_MEGABYTES = 200  # a file whose reading takes long enough to be said


@dataclass(slots=True)
class Rows(Sequence[Row]):
    """The rows of one dataset, in file order, with the place each came from.

    `lines` holds a 1-based line number per row where the file type has lines (else it is empty).
    """

    name: str
    values: list[Row] = field(default_factory=list)
    lines: array = field(default_factory=lambda: array("q"))
    starts: list[int] = field(default_factory=list)  # index of each file's first row
    labels: list[str] = field(default_factory=list)  # … and that file's name
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.values)

    def where(self, index: int) -> str:
        """ "file:line" of a row, as far as known."""
        if not self.labels:
            return self.name
        label = self.labels[bisect_right(self.starts, index) - 1]
        return f"{label}:{self.lines[index]}" if self.lines else f"{label} row {index}"

    def add(self, label: str, part: Part) -> None:
        """Append one file's rows."""
        self.starts.append(len(self.values))
        self.labels.append(label)
        if len(part.lines) == len(part.values):
            self.lines.extend(part.lines)
        self.values += part.values
        self.notes += part.notes


@dataclass(slots=True)
class Part:
    """What one file held."""

    values: list[Row]
    lines: array = field(default_factory=lambda: array("q"))
    notes: list[str] = field(default_factory=list)


def read_rows(spec: DatasetSpec, *, token: str | None = None, cache_dir: str | Path | None = None) -> Rows:
    """Every row of a dataset. Raises DataError with all faults, or ModelError if a hub is out of
    reach.
    """
    has_folder = spec.hub_id and Path(spec.hub_id).is_dir()  # where a hub is out of reach, a folder of its name
    copy = None if has_folder else find_copy(spec)
    if copy:
        log.info("dataset %s: the copy fetched on %s is read", spec.name, copy.fetched)
        rows = _read_all(spec.name, [(_label(copy.file), copy.file)])
    elif spec.hub_id and not has_folder:
        rows = Rows(spec.name, _read_hub(spec, token, cache_dir))
    elif spec.url:
        rows = _read_all(spec.name, [(spec.url, _fetch(spec.url))])
    else:
        files = list_files(spec.source or Path(spec.hub_id or ""), spec)
        rows = _read_all(spec.name, ((_label(path), path) for path in files))
    for note in dict.fromkeys(rows.notes):
        log.info("dataset %s: %s", spec.name, note)
    return rows


def list_files(source: Path, spec: DatasetSpec) -> list[Path]:
    """The data files a path, folder or glob stands for, sorted. Raises DataError (D19)."""
    source = source / spec.folder if spec.folder else source
    where = f"dataset {spec.name!r} ({spec.origin})"
    if source.is_file():
        _refuse_unknown_types([source], where)
        return [source]
    if source.is_dir():
        return _files_in(source, where)
    if glob.has_magic(str(source)):
        files = sorted(Path(p) for p in glob.glob(str(source), recursive=True))
        files = [p for p in files if p.is_file()]
        if not files:
            raise DataError(f"no file matches {source.absolute()}", where=where, fix="check the pattern")
        _refuse_unknown_types(files, where)
        _refuse_mixed_types(files, source, where)
        return files
    problem = missing_path(source)
    raise DataError([Problem(problem.what, where, fix=problem.fix)])


def _files_in(folder: Path, where: str) -> list[Path]:
    """Data files below a folder. Hidden files and the registry are no data; other files are named
    in a note.
    """
    if (folder / "state.json").is_file() and any(folder.glob("*.arrow")):
        return _saved_to_disk(folder)
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        if path.name in REGISTRY_NAMES:
            continue
        (files if path.suffix.lower() in FILE_SUFFIXES else others).append(path)
    if not files:
        raise DataError(
            f"no data file in {folder.absolute()}",
            where=where,
            expected=f"files of one type: {', '.join(FILE_SUFFIXES)}",
        )
    _refuse_mixed_types(files, folder, where)
    if others:
        log.info("%s: left out %s", where, ", ".join(p.name for p in others[:5]))
    return files


def _saved_to_disk(folder: Path) -> list[Path]:
    # What `datasets.Dataset.save_to_disk` leaves: the order of its pieces stands in state.json.
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / piece["filename"] for piece in state["_data_files"]]


def _refuse_unknown_types(files: list[Path], where: str) -> None:
    unknown = [path for path in files if path.suffix.lower() not in FILE_SUFFIXES]
    if unknown:
        raise DataError(
            f"cannot tell the type of {', '.join(p.name for p in unknown[:3])}",
            where=where,
            expected=f"a name that ends in {', '.join(FILE_SUFFIXES)}",
        )


def _refuse_mixed_types(files: list[Path], source: Path, where: str) -> None:
    suffixes = sorted({_type_of(path) for path in files})
    if len(suffixes) > 1:
        raise DataError(
            f"{source.absolute()} holds files of several types: {', '.join(suffixes)}",
            where=where,
            expected="files of one type",
            fix=f"name the files of one type by a pattern, as in {source.parent}/*{suffixes[0]}",
        )


def _type_of(path: Path) -> str:
    suffix = path.suffix.lower()
    return ".jsonl" if suffix == ".ndjson" else suffix


def _label(path: Path) -> str:
    """A path as a user would type it from here."""
    relative = os.path.relpath(path) if path.anchor == Path.cwd().anchor else str(path)
    return str(path.absolute()) if relative.startswith("..") else relative


def _read_all(name: str, files) -> Rows:
    rows, problems = Rows(name), []
    for label, content in files:
        try:
            rows.add(label, _read_file(label, content))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return rows


def _read_file(label: str, content: Path | bytes) -> Part:
    suffix = Path(label.split("?")[0]).suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise DataError(
            "cannot tell the type of this file",
            where=label,
            expected=f"a name that ends in {', '.join(FILE_SUFFIXES)}",
        )
    if suffix in (".parquet", ".arrow"):
        return _read_table(label, content, suffix)
    if isinstance(content, Path) and (megabytes := content.stat().st_size >> 20) > _LONG_MEGABYTES:
        log.info("reading %s (%s MB)", label, f"{megabytes:,}")
    data = content if isinstance(content, bytes) else content.read_bytes()
    text, notes = _decode(label, data)
    reader = _TEXT_READERS.get(suffix, _read_json)
    part = reader(label, text)
    part.notes = notes + part.notes
    return part


# ---- text ----------------------------------------------------------------------------------------


def _decode(label: str, data: bytes) -> tuple[str, list[str]]:
    """UTF-8 text without its byte order mark, and what was noticed on the way. Raises DataError
    (D4).
    """
    notes = []
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
        notes.append("begins with a byte order mark, which is left out")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError([_not_utf8(label, data, 0, "UTF-16")])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError([_not_utf8(label, data, error.start)]) from None
    if "\r\n" in text:
        notes.append("has Windows line ends (CRLF), which are read as line ends")
    return text, notes


def _not_utf8(label: str, data: bytes, offset: int, encoding: str | None = None) -> Problem:
    encoding = encoding or _guess_encoding(data, offset)
    line = data.count(b"\n", 0, offset) + 1
    path = Path(label)
    target = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return Problem(
        f"not UTF-8: byte 0x{data[offset]:02x} at offset {offset}"
        + (f"; it looks like {encoding}" if encoding else ""),
        where=f"{label}:{line}",
        expected="UTF-8",
        fix=f'iconv -f {encoding or "ENCODING"} -t UTF-8 "{path}" > "{target}"',
    )


def _guess_encoding(data: bytes, offset: int) -> str | None:
    from charset_normalizer import from_bytes

    # Whole lines around the fault: a window cut inside a character would mislead the guess.
    start = data.rfind(b"\n", 0, max(0, offset - _SAMPLE // 2)) + 1
    stop = data.find(b"\n", start + _SAMPLE)
    best = from_bytes(data[start : stop if stop > 0 else len(data)][: 4 * _SAMPLE]).best()
    if best is None:
        return None
    # GB18030 contains GBK contains GB2312: the largest converts whatever the smaller ones can.
    return "GB18030" if best.encoding in ("gb2312", "gbk", "gb18030") else best.encoding.upper()


def _read_lines(label: str, text: str) -> Part:
    """A document a line; blank lines are no documents."""
    lines = text.split("\n")
    part = Part([])
    for number, line in enumerate(lines, 1):
        if line.strip():
            part.values.append({"text": line.rstrip("\r")})
            part.lines.append(number)
    _note_blank(part, sum(1 for line in lines[:-1] if not line.strip()))
    return part


def _note_blank(part: Part, blank: int) -> None:
    if blank:
        part.notes.append(f"{blank:,} blank line{'s' * (blank > 1)} left out")


def _read_table_of_text(label: str, text: str) -> Part:
    """CSV or TSV with a header. Every cell is text, as written."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter="\t" if label.endswith("tsv") else ",")
    faults, part = _Faults(label), Part([])
    try:
        header = next(reader, [])
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"column {twice[0]!r} is there twice", where=f"{label}:1")
        line = reader.line_num + 1
        for cells in reader:
            if not cells:
                pass  # a blank line
            elif len(cells) == len(header):
                part.values.append(dict(zip(header, cells, strict=True)))
                part.lines.append(line)
            else:
                faults.add(line, f"{len(cells)} cells, but the header has {len(header)}")
            line = reader.line_num + 1
    except csv.Error as error:
        faults.add(reader.line_num, str(error))
    faults.raise_any(len(part.values))
    return part


# ---- JSON ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Faults:
    """Faults of one file: the first three with their text, ten with their place, all counted."""

    label: str
    problems: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, what: str, column: int | None = None, excerpt: str = "") -> None:
        self.count += 1
        if len(self.problems) < _SHOWN:
            where = f"{self.label}:{line}" + (f":{column}" if column else "")
            shown = f"\n{excerpt}" if excerpt and len(self.problems) < _IN_FULL else ""
            self.problems.append(Problem(what + shown, where))

    def raise_any(self, good: int) -> None:
        if not self.count:
            return
        if self.count > 1:
            shown = f", the first {_SHOWN} of them" if self.count > len(self.problems) else ""
            total = f"{self.count:,} of {good + self.count:,} lines cannot be read{shown}"
            self.problems.insert(0, Problem(total, self.label))
        raise DataError(self.problems)


def _read_json(label: str, text: str) -> Part:
    """An array of objects, an object a line, or objects one after another: told apart by their
    look.
    """
    start = len(text) - len(text.lstrip())
    if text.startswith("[", start):
        return _collect(label, text, jsontext.array_elements(text, start))
    if _is_one_object_a_line(text):
        return _read_jsonl(label, text)
    return _collect(label, text, jsontext.successive_values(text, start))


def _is_one_object_a_line(text: str) -> bool:
    """Whether a line that begins an object also ends it; one faulty line must not decide."""
    first: list[str] = []
    position = 0
    while position < len(text) and len(first) < 5:
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        if text.startswith("{", position):
            first.append(text[position:end].rstrip())
        position = end + 1
    if any(line.endswith("},") and _is_whole(line[:-1]) for line in first):
        return False  # objects one after another, with commas between them
    # Lines that all hold more than a brace are meant as JSONL, faulty as they are.
    head = [line for line in text[:_SAMPLE].split("\n") if line.strip()]
    meant = len(head) > 1 and all(line.startswith("{") and line.rstrip()[1:] for line in head)
    return meant or any(_is_whole(line) for line in first)


def _is_whole(line: str) -> bool:
    try:
        jsontext.decode_all(line)
    except JsonFault as fault:
        return fault.complete
    return True


def _read_jsonl(label: str, text: str) -> Part:
    faults, part, blank = _Faults(label), Part([]), 0
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            blank += 1
            continue
        try:
            value = jsontext.decode_all(line)
        except JsonFault as fault:
            excerpt = jsontext.caret(line, fault.offset)
            faults.add(number, fault.message, fault.offset + 1, excerpt)
            continue
        if not isinstance(value, dict):
            faults.add(number, f"this line holds {_kind(value)}, not an object")
            continue
        part.values.append(value)
        part.lines.append(number)
    faults.raise_any(len(part.values))
    _note_blank(part, blank - (not lines[-1]))
    return part


def _collect(label: str, text: str, elements: Iterator[tuple[Any, int]]) -> Part:
    """The objects of an array, or of a run of objects. Raises DataError (D1, D2)."""
    faults, part, line, seen = _Faults(label), Part([]), 1, 0
    try:
        for value, offset in elements:
            line += text.count("\n", seen, offset)
            seen = offset
            if isinstance(value, dict):
                part.values.append(value)
                part.lines.append(line)
            else:
                faults.add(line, f"element {len(part.lines)} is {_kind(value)}, not an object with columns")
    except JsonFault as fault:
        number, column = jsontext.line_and_column(text, fault.offset)
        where = f"{label}:{number}:{column}"
        if fault.truncated:
            size = f"{len(text.encode('utf-8')):,}".replace(",", " ")
            what = f"file ends inside element {len(part.values)} (byte {size}); truncated download?"
            faults.problems.insert(0, Problem(what, where, fix="fetch the file again"))
        else:
            excerpt = jsontext.caret(text, fault.offset)
            what = f"{fault.message}, in element {len(part.values)}\n{excerpt}"
            faults.problems.insert(0, Problem(what, where))
        raise DataError(faults.problems) from None
    faults.raise_any(len(part.values))
    return part


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


_TEXT_READERS: dict[str, Callable[[str, str], Part]] = {
    ".csv": _read_table_of_text,
    ".tsv": _read_table_of_text,
    ".txt": _read_lines,
}


# ---- tables --------------------------------------------------------------------------------------


def _read_table(label: str, content: Path | bytes, suffix: str) -> Part:
    """Parquet or Arrow (file or stream), read in memory: no cache is written anywhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = pa.BufferReader(content) if isinstance(content, bytes) else pa.memory_map(str(content))
    try:
        if suffix == ".parquet":
            return Part(pq.read_table(source).to_pylist())
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
        return Part(table.to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"not a readable {suffix[1:]} file: {str(error).splitlines()[0]}",
            where=label,
            fix="fetch or write the file again",
        ) from None


# ---- hubs and URLs -------------------------------------------------------------------------------


def _fetch(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except ImportError as error:
        raise ModelError(f"reading {url} needs another library: {error}", fix="pip install it") from None
    except FileNotFoundError:
        raise DataError(f"nothing is there: {url}") from None
    except Exception as error:  # each file system has errors of its own
        raise ModelError(f"cannot reach {url}: {_first_line(error)}") from error


def _read_hub(spec: DatasetSpec, token: str | None, cache_dir) -> list[Row]:
    return load_from_hub(spec, token, cache_dir).to_list()


def load_from_hub(spec: DatasetSpec, token: str | None = None, cache_dir: str | Path | None = None) -> Any:
    """A hub's dataset, as a `datasets.Dataset`. `subset: a+b` is both, one after the other.

    Raises:
        DataError: no such split or subset. ModelError: whatever else keeps it from coming (C17).
    """
    loader = {"modelscope": _load_modelscope, "modelers": _load_modelers}.get(spec.hub, _load_huggingface)
    subsets = (spec.subset or "").split("+")
    try:
        parts = [loader(replace(spec, subset=subset or None), token, cache_dir) for subset in subsets]
        if len(parts) == 1:
            return parts[0]
        from datasets import concatenate_datasets

        return concatenate_datasets(parts)
    except (DataError, ModelError):
        raise
    except ImportError as error:
        raise ModelError(
            f"dataset {spec.hub_id!r} is on {spec.hub}, whose client is not installed",
            fix="pip install 'trueup[hubs]'",
        ) from error
    except Exception as error:  # hubs' clients raise a zoo; each means: this did not come
        raise _hub_problem(spec, error) from error


def _load_huggingface(spec: DatasetSpec, token: str | None, cache_dir):
    from datasets import load_dataset

    return load_dataset(
        spec.hub_id,
        name=spec.subset,
        data_dir=spec.folder,
        split=spec.split,
        token=token,
        cache_dir=str(cache_dir) if cache_dir else None,
    )


def _load_modelscope(spec: DatasetSpec, token: str | None, cache_dir):
    from modelscope import MsDataset  # pyright: ignore[reportMissingImports]

    dataset = MsDataset.load(
        spec.hub_id,
        subset_name=spec.subset,
        data_dir=spec.folder,
        split=spec.split,
        token=token,
        cache_dir=str(cache_dir) if cache_dir else None,
    )
    return dataset.to_hf_dataset() if hasattr(dataset, "to_hf_dataset") else dataset


def _load_modelers(spec: DatasetSpec, token: str | None, cache_dir):
    """Modelers' own dataset class needs a numpy from before 2: its files are fetched, and read like local ones."""
    from datasets import load_dataset
    from openmind_hub import snapshot_download  # pyright: ignore[reportMissingImports]

    directory = snapshot_download(
        spec.hub_id, repo_type="dataset", token=token, cache_dir=str(cache_dir) if cache_dir else None
    )
    return load_dataset(directory, name=spec.subset, data_dir=spec.folder, split=spec.split)


def _hub_problem(spec: DatasetSpec, error: Exception) -> Exception:
    """What a hub client's complaint means for the user (C17). The token itself is never shown."""
    name, text = type(error).__name__, _first_line(error)
    where = f"dataset {spec.hub_id!r} on {spec.hub}"
    key = {"modelscope": "ms_hub_token", "modelers": "om_hub_token"}.get(spec.hub, "hf_hub_token")
    if isinstance(error, ValueError) and "split" in text.lower():
        return DataError(text, where=where, fix="set `split` in its entry of dataset_info.json")
    if isinstance(error, ValueError) and "config" in text.lower():
        return DataError(text, where=where, fix="set `subset` in its entry of dataset_info.json")
    if "Gated" in name or "gated" in text or "401" in text or "403" in text:
        return ModelError(
            "access is refused: the dataset is private or gated",
            where=where,
            fix=f"accept its terms on the hub, then set {key} to a token of that account",
        )
    if "NotFound" in name and "offline" not in text.lower() and "reach" not in text.lower():
        return ModelError(f"not found: {text}", where=where, fix="check owner/name and split")
    get = f"trueup data get {spec.catalogue or spec.hub_id}"
    return ModelError(
        f"the hub cannot be reached ({name}: {text})",
        where=where,
        fix="check the network; or put the data files into a local folder of that name, "
        f"or pass their path as `dataset:`; `{get}`, once and with a network, keeps a copy for offline use",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ---- mixing --------------------------------------------------------------------------------------


def sample_indices(rows: int, num_samples: int | None, seed: int) -> np.ndarray:
    """Which rows to use, in order: all, or a random draw of `num_samples` (with repeats beyond
    `rows`).
    """
    if num_samples is None or rows == 0:
        return np.arange(rows)
    random = np.random.default_rng(seed)
    drawn = random.permutation(rows)[:num_samples]
    if num_samples > rows:
        drawn = np.concatenate([drawn, random.integers(rows, size=num_samples - rows)])
    return drawn


def mix(
    sizes: Sequence[int],
    strategy: str = "concat",
    probs: Sequence[float] | None = None,
    seed: int = 42,
) -> list[tuple[int, int]]:
    """(dataset, index) in training order. Deterministic: the same arguments give the same mix.

    concat: one after another. interleave_under: in turn (or drawn by `probs`), until the first
    dataset is used up. interleave_over: until every dataset has been used up once, starting over
    with short ones. interleave_once: until all are used up, each row once. Raises ConfigError.
    """
    if strategy == "concat":
        return [(d, i) for d, size in enumerate(sizes) for i in range(size)]
    if strategy not in ("interleave_under", "interleave_over", "interleave_once"):
        raise ConfigError(
            f"unknown mix_strategy {strategy!r}",
            expected="concat | interleave_under | interleave_over | interleave_once",
        )
    weights = _weights(probs, len(sizes))
    random = np.random.default_rng(seed)
    exhausted = {d for d, size in enumerate(sizes) if size == 0}
    taken, order = [0] * len(sizes), []

    def done() -> bool:
        return len(exhausted) == len(sizes) or (strategy == "interleave_under" and bool(exhausted))

    while not done():
        # In turn: each dataset once, and a turn begun is finished. By weight: stop at the very
        # draw.
        for d in range(len(sizes)) if weights is None else _draws(weights, random):
            if sizes[d] == 0 or (strategy == "interleave_once" and d in exhausted):
                continue
            order.append((d, taken[d] % sizes[d]))
            taken[d] += 1
            if taken[d] >= sizes[d]:
                exhausted.add(d)
            if weights is not None and done():
                break
    return order


def _draws(weights: np.ndarray, random: np.random.Generator) -> list[int]:
    return random.choice(len(weights), size=1024, p=weights).tolist()


def _weights(probs: Sequence[float] | None, count: int) -> np.ndarray | None:
    if probs is None:
        return None
    weights = np.asarray(probs, dtype=np.float64)
    if len(weights) != count or not np.isfinite(weights).all() or (weights <= 0).any():
        raise ConfigError(
            f"interleave_probs is {list(probs)}",
            expected=f"{count} positive numbers, one for each dataset",
        )
    return weights / weights.sum()

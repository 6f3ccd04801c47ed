"""A process that runs the operator's functions, so that one that hangs or crashes can be ended: `python -m` this.

Reads JSON lines `{"function": "FILE.py:NAME" | "NAME", "batch": {column: [values]}}` and answers each with
`{"values": […]}` or `{"error": …}`. `{"function": …}` alone only looks the function up. What functions print goes to
standard error. Imports nothing of trueup but the built-in rewards.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from trueup.rollout import verify

BUILT_IN: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (verify.exact_match, verify.numeric, verify.regex, verify.json_schema, verify.sql_result)
}


class Refused(Exception):
    """The function cannot be had or called; the text says why."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what functions print is no answer
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def _end_with(parent: int) -> None:
    """End this process and what it started once `parent` is gone: a function that hangs reads no end of input."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One request's answer."""
    try:
        function = find(request["function"])
        if "batch" not in request:
            return {"values": []}
        return {"values": call(function, request["batch"])}
    except Refused as error:
        return {"error": str(error)}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"error": f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"}


def file_and_function(name: str) -> tuple[str, str]:
    """`FILE.py:NAME` in its parts: no file where it is a built-in function's name, no name where it is a file alone."""
    path, _, function = name.rpartition(":")
    return (name, "") if function.endswith(".py") else (path, function)


def find(name: str) -> Callable[..., Any]:
    """The function of a name as `reward_funcs` has it. Raises Refused."""
    path, function = file_and_function(name)
    if not path:
        if name not in BUILT_IN:
            raise Refused(f"no built-in reward is called {name!r}; there are {', '.join(BUILT_IN)}")
        if name == "json_schema" and importlib.util.find_spec("jsonschema") is None:
            raise Refused("it needs jsonschema: pip install 'trueup[rewards]'")
        return BUILT_IN[name]
    if not function:
        raise Refused("it names no function of this file")
    found = getattr(_load(path), function, None)
    if not callable(found):
        raise Refused(f"{path} has no function {function!r}")
    return found


@cache
def _load(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise Refused(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise Refused(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(path).resolve().parent))  # its neighbours can be imported, as in a script
    spec.loader.exec_module(module)
    return module


def call(function: Callable[..., Any], batch: dict[str, list[Any]]) -> list[float | None]:
    """The function's numbers for a batch; it gets the columns it has parameters for. Raises Refused."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.name in named and p.default is p.empty}
    if missing := sorted(required - batch.keys()):
        have = ", ".join(sorted(batch))
        raise Refused(f"{function.__name__} wants {', '.join(missing)}; rows have {have}")
    values = function(**{key: column for key, column in batch.items() if takes_all or key in named})
    size = len(batch["completions"])
    if not isinstance(values, list | tuple) or len(values) != size:
        raise Refused(f"{function.__name__} returned {_shown(values)} for {size} answers; expected a list of {size}")
    return [None if value is None else float(value) for value in values]


def _shown(values: Any) -> str:
    return f"{len(values)} values" if isinstance(values, list | tuple) else type(values).__name__


if __name__ == "__main__":
    main()

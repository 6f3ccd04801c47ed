"""Imports point one way, and nothing heavy is loaded before a command line is known to be valid."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trueup.builtin import QUICKSTART_CONFIG

PACKAGE = ROOT / "src" / "trueup"
LEAVES = {"errors", "types", "waiting", "garbage", "memory", "network", "cache"}
#: Layer → what it may import besides itself and `LEAVES`.
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "waiting": set(),
    "garbage": set(),
    "memory": set(),
    "network": set(),
    "cache": set(),
    "builtin": set(),
    "config": {"builtin"},
    "data": {"config", "builtin"},
    "objectives": {"config"},
    "models": {"config", "builtin"},
    "training": {"config"},
    "rollout": {"config", "models"},
    "recipes": {"config", "builtin", "data", "objectives", "models", "training", "rollout", "quantities"},
    "inference": {
        "config",
        "builtin",
        "data",
        "objectives",
        "models",
        "training",
        "rollout",
        "console",
    },
    "console": set(),
    "quantities": set(),
    "launch": {"config"},
    "cli": {
        "config",
        "recipes",
        "inference",
        "console",
        "launch",
        "cli_data",
        "cli_export",
        "cli_serve",
        "cli_web",
        "cli_options",
    },
    "cli_data": {"config", "data", "recipes", "inference", "console", "cli_options"},
    "cli_export": {"config", "inference", "console", "cli_options"},
    "cli_serve": {"inference", "console", "cli_options"},
    "cli_web": {"web", "inference", "console", "cli_options", "cli_serve"},
    "web": {"config", "builtin", "data", "training", "inference", "quantities"},
    "cli_options": {"config", "console"},
    "trl": {"api", "config", "data", "models", "rollout", "training"},
    "unsloth": {"api", "config", "models", "trl"},
    "api": {"config", "data", "models", "training", "recipes", "inference"},
    "__main__": {"cli"},
    "__init__": {"api", "inference", "rollout"},  # imported when a name of theirs is asked for
}
#: Importable without torch, and without anything that takes long.
QUICK = (
    "trueup", "trueup.errors", "trueup.console", "trueup.launch", "trueup.cli", "trueup.builtin",
    "trueup.config.load", "trueup.config.starter", "trueup.inference.runs",
)  # fmt: skip
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "matplotlib",
    "pandas",
    "numpy",
    "fastapi",
    "nicegui",
)

#: Installed or not, no training needs these before its first step; torch, transformers and peft do not load them.
NOT_FOR_A_STEP = (
    "datasets",
    "pyarrow",
    "pandas",
    "matplotlib",
    "fastapi",
    "uvicorn",
    "nicegui",
    "aiohttp",
    "openai",
    "IPython",
    "ray",
    "vllm",
    "trl",
    "tensorboard",
    "wandb",
    "mlflow",
    "swanlab",
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            base = str(node.module)
            names = [f"trueup.{alias.name}" for alias in node.names] if base == "trueup" else [base]
            yield from ((node.lineno, name) for name in names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    own = layer(path)
    assert own in ALLOWED, f"{own} is not in the layout: add it to ALLOWED and to the README's tree"
    wrong = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "trueup" or len(parts) == 1 or parts[1] == "__version__":
            continue
        if parts[1] not in {own, *LEAVES, *ALLOWED[own]}:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} must not import {name}")
    assert not wrong, "\n".join(wrong)


def loaded_by(code: str, names: Sequence[str] = HEAVY) -> set[str]:
    """Those of the packages that a fresh interpreter has loaded after running `code`."""
    code += f"\nimport sys, json\nfound = [n for n in {names!r} if n in sys.modules]"
    code += "\nprint('LOADED', json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "LOADED" in done.stdout, done.stderr
    return set(json.loads(done.stdout.rpartition("LOADED")[2]))


def verb(*words: str) -> str:
    return f"from trueup.cli import main\ntry:\n    main({list(words)!r})\nexcept SystemExit: pass"


@pytest.mark.parametrize("module", QUICK)
def test_quick_modules_load_nothing_heavy(module: str):
    assert loaded_by(f"import {module}") == set()


@pytest.mark.parametrize("words", [["--help"], ["version"], ["train", "-h"], ["help", "pref_beta"], ["runs"]])
def test_quick_verbs_load_nothing_heavy(words: list[str]):
    assert loaded_by(verb(*words)) == set()


def test_a_bad_config_is_refused_before_anything_heavy_is_loaded(tmp_path: Path):
    config = tmp_path / "bad.yaml"
    config.write_text("stage: dpo\nleraning_rate: 1e-5\npref_beta: -1\n", encoding="utf-8")
    for name in ("check", "train"):
        assert loaded_by(verb(name, str(config))) == set()


def test_a_training_loads_nothing_it_does_not_need_before_its_first_step(tmp_path: Path):
    output = tmp_path / "out"
    words = [
        str(QUICKSTART_CONFIG),
        f"output_dir={output}",
        "device=cpu",
        "max_samples=32",
        "precompute_ref_log_probs=false",
    ]
    leave = "from trueup.recipes.program import OfflineProgram\ndef leave(*_): raise SystemExit\n"
    code = f"{leave}OfflineProgram.loss = leave\n{verb('train', *words)}"
    assert loaded_by(code, NOT_FOR_A_STEP) == set()
    assert (output / "run.yaml").exists(), "the run never came to its first step"


@pytest.mark.parametrize("words", [["--help"], ["version"], ["check", "leraning_rate=1", "pref_beta=-1"]], ids=" ".join)
def test_quick_verbs_take_little_more_than_the_libraries_they_need(words: list[str]):
    """Some three times as much CPU, however fast the machine is just now."""
    bare = [sys.executable, "-c", "import pydantic.main, rich.console, yaml"]
    verb = [sys.executable, "-m", "trueup", *words]
    assert min(cpu_seconds(verb) / cpu_seconds(bare) for _ in range(3)) < 5


def cpu_seconds(command: list[str]) -> float:
    resource = pytest.importorskip("resource", reason="CPU time of children is read the Unix way")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, env={**os.environ, "COLUMNS": "80"}, timeout=60, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

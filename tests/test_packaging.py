"""What a stranger gets: the wheel, the pins, the make targets, and a truthful README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from trueup import __version__
from trueup.cli import LATER, main
from trueup.config.load import load_config

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCS = [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
BUILTIN_LIMIT = 12 * 2**20  # bytes of the built-in model and its data inside the wheel


def commands(path: Path) -> list[str]:
    """Lines of the shell blocks of a Markdown file, comments aside."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# --- documents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_in_the_documents_exist(path: Path):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    context = click.Context(main)
    for line in commands(path):
        words = [word for word in line.split() if "=" not in word]
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
        if words[0] == "trueup":
            assert main.get_command(context, words[1]) is not None, line
            assert words[1] not in LATER, f"{line}: not there yet"


@pytest.mark.parametrize("path", [*DOCS, *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path: Path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


def test_every_config_the_documents_name_exists():
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS)
    for name in re.findall(r"examples/[\w.-]+\.yaml", text):
        assert (ROOT / name).exists(), name


def test_the_readme_names_every_module_and_only_those():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## Layout")[1].split("\n## ")[0]
    named, folders = set(), {}
    for indent, name in re.findall(r"^( *)([\w/.-]+)", tree, re.MULTILINE):
        level = len(indent) // 2
        if name.endswith("/"):
            folders[level] = name
        elif name.endswith(".py") and level:
            named.add("".join(folders[i] for i in range(1, level)) + name)
    package = ROOT / "src" / "trueup"
    present = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert named == present


# --- examples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load(path: Path):
    verbs = {"builtin_build": "build", "builtin_eval": "eval", "builtin_export": "export"}
    load_config(path, verb=verbs.get(path.stem, "train"))


def test_examples_are_listed():
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES if path.name not in listed] == []


# --- pins --------------------------------------------------------------------------------------


def test_pins_satisfy_the_ranges_and_cover_core_and_dev():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    first = next(line for line in lines if not line.startswith("#"))
    assert first == f"torch=={pins['torch']}", "torch comes first: others would pull in another build"
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_floors_close_the_known_holes():
    """Those that SECURITY.md names."""
    floors = {Requirement(text).name: Requirement(text).specifier for text in PROJECT["dependencies"]}
    for name, unsafe in {"torch": "2.9.1", "transformers": "5.2.0", "jinja2": "3.1.5"}.items():
        assert unsafe not in floors[name]


def test_the_extras_that_guides_name_exist():
    wanted = {"web", "serve", "quant", "vllm", "deepspeed", "ray", "track", "eval", "gguf", "gptq", "awq", "dev"}
    assert wanted | {"torch", "metrics", "gpu"} <= set(PROJECT["optional-dependencies"])


# --- make --------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@needs_make
@pytest.mark.parametrize("target", ["quickstart", "test", "check", "bench", "prove", "builtin-model"])
def test_every_target_installs_first_with_torch_before_the_rest(target: str, tmp_path: Path):
    lines = make("-n", target, f"VENV={tmp_path}/venv").stdout.splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert "torch==" in installs[0]
    assert all("-c constraints.txt" in line for line in installs)


@needs_make
def test_without_a_python_make_says_what_is_missing(tmp_path: Path):
    done = make("quickstart", "PYTHON=", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_calls_what_the_readme_calls():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    for target in ("check", "test", "quickstart"):
        assert re.search(rf"^make .*\b{target}$", script, re.MULTILINE)
        assert f"make {target}" in (ROOT / "README.md").read_text(encoding="utf-8")


# --- the wheel ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling", reason="the dev extra brings the build backend")
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_the_wheel_holds_everything_the_package_reads(wheel: zipfile.ZipFile):
    names = set(wheel.namelist())
    package = ROOT / "src" / "trueup"
    wanted = {
        "trueup/" + path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= names
    assert "trueup/py.typed" in names
    assert any(name.endswith(".jinja") for name in names)
    assert "trueup/builtin/data/dataset_info.json" in names
    assert not [name for name in names if name.startswith(("tests/", "src/", "docs/"))]


def test_the_wheel_has_the_built_in_model_within_its_size(wheel: zipfile.ZipFile):
    inside = [info for info in wheel.infolist() if info.filename.startswith("trueup/builtin/")]
    assert any(info.filename.endswith("sql-tiny/model.safetensors") for info in inside)
    assert sum(info.file_size for info in inside) <= BUILTIN_LIMIT


def test_the_wheel_carries_version_licence_and_command(wheel: zipfile.ZipFile):
    def metadata(name: str) -> str:
        found = next(n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
        return wheel.read(found).decode("utf-8")

    assert f"Version: {__version__}\n" in metadata("METADATA")
    assert "License-Expression: Apache-2.0" in metadata("METADATA")
    assert "trueup = trueup.cli:main" in metadata("entry_points.txt")
    assert "Apache License" in metadata("licenses/LICENSE")


def test_no_machine_of_ours_is_named_anywhere():
    """Paths and hosts of whoever built this are no part of the project."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    private = re.compile(r"/(?:work|opt/venv|home/\w+|root)/\w")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".txt", ".json", ".cff") and path.exists():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if private.search(line) and name != "tests/test_packaging.py":
                    found.append(f"{name}:{number}")
    assert not found

"""What SECURITY.md promises of our own source, held by reading it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "runs text as code",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "asyncio.create_subprocess_shell": "a shell",
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "numpy.fromfile": "reads raw bytes unchecked",
    "yaml.load": "can build any object; use safe_load",
    "yaml.load_all": "can build any object",
    "yaml.unsafe_load": "can build any object",
    "yaml.full_load": "can build any object",
}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_ARGUMENTS = {("shell", True), ("allow_pickle", True), ("trust_remote_code", True)}
#: Only these may turn a name into a model or tokenizer: they alone decide what is trusted.
LOADERS = {"models"}
EXCEPTIONS = {"builtin/build.py"}  # loads only the model it has just made
LOADER_CLASSES = (
    "AutoModel",
    "AutoTokenizer",
    "AutoConfig",
    "AutoProcessor",
    "PeftModel",
    "PeftConfig",
)

SOURCES = sorted(path for folder in ("src", "benchmarks", "recipes") for path in (ROOT / folder).rglob("*.py"))


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, reason) of everything that is forbidden anywhere."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (
                    (node.lineno, f"import {n.name}") for n in names if n.name.split(".")[0] in FORBIDDEN_IMPORTS
                )
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_IMPORTS:
                yield node.lineno, f"import {module}"
            case ast.Call(func=func, keywords=keywords):
                name = dotted(func).replace("np.", "numpy.")
                if name in FORBIDDEN_CALLS:
                    yield node.lineno, f"{name}: {FORBIDDEN_CALLS[name]}"
                for word in keywords:
                    if isinstance(word.value, ast.Constant) and (word.arg, word.value.value) in FORBIDDEN_ARGUMENTS:
                        yield node.lineno, f"{name}({word.arg}={word.value.value})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_no_pickle_no_code_from_text(path: Path):
    found = [f"{path}:{line}: {reason}" for line, reason in findings(ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "subprocess.run(x, shell=True)",
        "os.system('ls')",
        "eval(x)",
        "torch.load(p)",
        "import pickle",
        "from dill import loads",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
    ],
)
def test_the_check_itself_sees_each_danger(code: str):
    assert list(findings(ast.parse(code)))


def test_only_the_model_layer_turns_names_into_models():
    """One wrapper decides about remote code, pickles and tokens; nobody goes around it."""
    package = ROOT / "src" / "trueup"
    found = [
        f"{path}:{node.lineno}: {dotted(node.func)}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] not in LOADERS and path.relative_to(package).as_posix() not in EXCEPTIONS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and dotted(node.func).endswith(".from_pretrained")
        and dotted(node.func).startswith(LOADER_CLASSES)
    ]
    assert not found, "\n".join(found)


def test_every_file_is_opened_with_its_encoding():
    """What a file says must not depend on the machine's locale."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func)
            # Path.write_text takes the text alone; our own writers also a name, and are UTF-8.
            opens = name == "open" or name.endswith(".read_text")
            opens = opens or (name.endswith(".write_text") and len(node.args) == 1)
            mode = node.args[1] if name == "open" and len(node.args) > 1 else None
            binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
            if opens and not binary and "encoding" not in {word.arg for word in node.keywords}:
                found.append(f"{path}:{node.lineno}: {name} without encoding")
    assert not found, "\n".join(found)

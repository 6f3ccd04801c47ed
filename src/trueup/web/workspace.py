"""Where data, runs and configs lie: one root directory, and ids in place of paths. Torch-free.

An id is a relative path that a browser may send: it is checked as text, then resolved, and has to stay inside its
area. An area may itself be a link to another disk: that is the operator's doing. Nothing is deleted; what is removed
lies in `.trueup/trash`.
"""

from __future__ import annotations

import ast
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from trueup.errors import ConfigError

STUDIO = ".trueup"  # what the studio keeps for itself
_SAVED = ("adapter_config.json", "config.json")  # either, if there is a model
_LONGEST = 400
_MOST = 200  # of anything that is listed


class Workspace:
    """The directory in which the studio was started. Children run in it, so relative paths mean the same there."""

    def __init__(self, root: Path, allowed: Sequence[Path] = ()) -> None:
        """`allowed`: further directories that configs may name, such as one of models."""
        self.root = root.resolve()
        self.allowed = [self.root, *(path.resolve() for path in allowed)]

    # --- areas -------------------------------------------------------------------------------

    def run(self, run_id: str) -> Path:
        """A run's directory, under `saves`."""
        return inside(self.root / "saves", run_id)

    def run_id(self, path: str | Path) -> str:
        """The id of the run whose `output_dir` is `path` (as a config has it). Raises ConfigError outside `saves`."""
        saves = self.root / "saves"
        whole = self.root / path
        for base in (saves, saves.resolve()):
            if whole.is_relative_to(base):
                name = whole.relative_to(base).as_posix()
                check_id(name)
                return name
        raise ConfigError(
            f"{path} is outside of the studio's runs", where="output_dir", expected="saves/… in the studio's directory"
        )

    def output_dir(self, run_id: str) -> str:
        """What a config calls a run's directory."""
        check_id(run_id)
        return f"saves/{run_id}"

    def data(self, file_id: str) -> Path:
        """A file or folder under `data`."""
        return inside(self.root / "data", file_id)

    def config(self, name: str) -> Path:
        """A saved config, under `configs`: `name` without its suffix."""
        return inside(self.root / "configs", f"{name}.yaml")

    def configs(self) -> list[str]:
        """Names of saved configs."""
        folder = self.root / "configs"
        return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))

    def private(self, *names: str) -> Path:
        """A directory that the studio keeps for itself, made if need be."""
        path = self.root.joinpath(STUDIO, *names)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def free_run_id(self, run_id: str) -> str:
        """`run_id`, or the first of `run_id-2`, `run_id-3` … that is not taken."""
        number, free = 1, run_id
        while self.run(free).exists():
            number += 1
            free = f"{run_id}-{number}"
        return free

    def has_model(self, run_id: str) -> bool:
        """Whether a run has saved a model or an adapter."""
        return any((self.run(run_id) / name).is_file() for name in _SAVED)

    # --- what configs may name ---------------------------------------------------------------

    def may_read(self, name: str) -> bool:
        """Whether a config may have this value: no path, or one inside the root or an allowed directory."""
        plain = unquote(unquote(name))
        if "\0" in plain:
            return False
        if plain.lower().startswith("file:"):
            plain = plain[5:].lstrip("/") and "/" + plain[5:].lstrip("/")
        parts = plain.replace("\\", "/").split("/")
        outward = plain.startswith(("/", "~", "\\")) or ".." in parts or plain[1:3] in (":/", ":\\")
        path = self.root / Path(plain).expanduser() if len(plain) < 4096 else self.root
        try:
            if not outward and not path.exists():
                return True  # a number, a name, a hub's id
            resolved = path.resolve()
        except (OSError, ValueError):
            return not outward
        return any(resolved.is_relative_to(base) for base in self.allowed)

    def code(self) -> list[str]:
        """Functions of Python files here, as `file.py:name`, for configs to name. Files are parsed, not run."""
        found = []
        for file in [*self.root.glob("*.py"), *self.root.glob("rewards/*.py")]:
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, SyntaxError):
                continue
            name = file.relative_to(self.root).as_posix()
            found += [f"{name}:{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)]
        return sorted(found)

    def models(self) -> list[str]:
        """Directories with a model that lie here, as a config names them."""
        found = []
        for folder in ("", "models", "*", "models/*", "*/*"):
            for config in sorted(self.root.glob(f"{folder}/config.json" if folder else "config.json"))[:_MOST]:
                if any(config.parent.glob("*.safetensors")) and config.parent != self.root:
                    found.append("./" + config.parent.relative_to(self.root).as_posix())
        return list(dict.fromkeys(found))

    def adapters(self) -> list[str]:
        """Directories of adapters that runs have saved, newest first."""
        found = [path.parent for path in (self.root / "saves").rglob("adapter_config.json")]
        newest = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
        return [path.relative_to(self.root).as_posix() for path in newest[:_MOST]]

    def trained(self) -> list[str]:
        """Whole models that runs have saved, checkpoints among them, newest first."""
        found = [path.parent for path in (self.root / "saves").rglob("config.json")]
        whole = [
            path for path in found if any(path.glob("*.safetensors")) and not (path / "adapter_config.json").exists()
        ]
        newest = sorted(whole, key=lambda path: path.stat().st_mtime, reverse=True)
        return ["./" + path.relative_to(self.root).as_posix() for path in newest[:_MOST]]

    # --- removing ----------------------------------------------------------------------------

    def trash(self, path: Path) -> Path:
        """Move a file or directory of an area into the trash; returns where it is now."""
        if not any(
            path.resolve().is_relative_to((self.root / area).resolve()) for area in ("saves", "data", "configs")
        ):
            raise ConfigError(f"{path.name} is not the studio's to remove")
        target = self.private("trash") / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}-{path.name}"
        path.rename(target)
        return target


def inside(area: Path, name: str) -> Path:
    """The path that an id names inside an area. Raises ConfigError for whatever leads out of it."""
    check_id(name)
    base = area.resolve()
    path = (base / name).resolve()
    if path == base or not path.is_relative_to(base):
        raise ConfigError(f"{name!r} leads out of {area.name}", expected=f"a name inside {area.name}")
    return path


def check_id(name: str) -> None:
    """Raise ConfigError unless `name` is plainly a relative path, whatever decodes or normalises it."""
    plain = unicodedata.normalize("NFKC", unquote(unquote(name)))
    parts = plain.split("/")
    wrong = (
        not name
        or len(name) > _LONGEST
        or plain != unicodedata.normalize("NFKC", name)  # percent-encoded
        or plain.count("/") != name.count("/")  # a look-alike of the slash
        or any(unicodedata.category(letter).startswith("C") for letter in name)
        or any(mark in plain for mark in '\\:*?"<>|\0')
        or any(part.startswith(".") or not part.strip() or part != part.rstrip(" .") for part in parts)
    )
    if wrong:
        raise ConfigError(f"{name[:80]!r} is no name here", expected="a relative path of plain names")

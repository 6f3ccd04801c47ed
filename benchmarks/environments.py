"""One virtual environment per peer, made with venv and pip as its own users would.

torch comes first and is pinned by a constraints file afterwards: asked for by another package's range, pip may take
a newer build, and on a machine without a GPU one with CUDA. On a machine with a GPU the same commands take the
CUDA build. `python -m benchmarks.environments` makes them all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.measure import HOME, Failed, read_json

_SHOWN = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "llamafactory", "ms_swift")


@dataclass(frozen=True)
class Recipe:
    """What is installed, in this order; later packages are held to the pins of `torch`."""

    torch: tuple[str, ...]
    packages: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


RECIPES = {
    "trl": Recipe(("torch==2.13.0",), ("trl==1.16.0", "peft")),
    # 0.9.5 needs torchvision and torchaudio, whose builds for 2.13 load only beside a CUDA build of torch.
    "llamafactory": Recipe(
        ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"),
        ("llamafactory==0.9.5",),
        {"DISABLE_VERSION_CHECK": "1"},
    ),
    "ms-swift": Recipe(("torch==2.13.0",), ("ms-swift==4.6.0",)),
}


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there or its recipe has changed."""
    directory, recipe = HOME / peer, RECIPES[peer]
    marker, wanted = directory / "recipe.json", json.dumps(asdict(recipe), sort_keys=True)
    python = directory / "bin" / "python"
    if not marker.exists() or json.dumps(read_json(marker), sort_keys=True) != wanted:
        print(f"installing {peer} into {directory}", file=sys.stderr)
        _call(sys.executable, "-m", "venv", "--clear", str(directory))
        pins = directory / "constraints.txt"
        pins.write_text("\n".join(recipe.torch) + "\n", encoding="utf-8")
        install = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _call(*install, *recipe.torch)
        _call(*install, "-c", str(pins), *recipe.packages)
        marker.write_text(wanted, encoding="utf-8")
    return python


def versions_of(peer: str) -> dict[str, str]:
    """The versions in a peer's environment that matter to its speed."""
    command = [str(python_of(peer)), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    found = {row["name"].lower().replace("-", "_"): row["version"] for row in json.loads(listed.stdout)}
    return {name: found[name] for name in _SHOWN if name in found}


def _call(*command: str) -> None:
    if subprocess.run(command, check=False).returncode:
        raise Failed(f"{' '.join(command)} failed")


def main() -> None:
    for peer in RECIPES:
        python_of(peer)
        print(peer, ", ".join(f"{name} {version}" for name, version in versions_of(peer).items()))


if __name__ == "__main__":
    main()

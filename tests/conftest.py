"""Shared by all tests: nothing of the developer's own environment gets in, and nothing gets out."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
_STEERING = [
    "FORCE_TORCHRUN",
    "NNODES",
    "NODE_RANK",
    "NPROC_PER_NODE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RDZV_ID",
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
    "USE_MODELSCOPE_HUB",
    "USE_OPENMIND_HUB",
    "ALLOW_EXTRA_ARGS",
    "HF_ENDPOINT",
    "NO_COLOR",
    "FORCE_COLOR",
    "COLUMNS",
]


def pytest_configure() -> None:
    """The fuzzers try the same examples in every run; with `--hypothesis-profile=default` they look for new ones."""
    hypothesis.settings.register_profile("same", derandomize=True)
    hypothesis.settings.load_profile("same")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable steers trueup unless a test sets it, and no hub is asked for anything."""
    for name in _STEERING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT

"""Where the tests on real data find it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def real_data() -> Path:
    """The folder of real sample sets beside the checkout, or TRUEUP_REAL_DATA; skips without it."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("TRUEUP_REAL_DATA", beside))
    if not (folder / "dataset_info.json").is_file():
        pytest.skip(f"no real data in {folder}; set TRUEUP_REAL_DATA to its folder")
    return folder

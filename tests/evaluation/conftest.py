"""The tiny model and data of the recipes' tests, and two short trainings on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipes.conftest import config, data_dir, private_cache, tiny_dir  # noqa: F401 (fixtures)
from trueup.recipes.run import run


@pytest.fixture
def trained(config: Callable, tmp_path: Path) -> Path:  # noqa: F811
    """A finished DPO run of a few steps, evaluated by itself."""
    cfg = config(eval_dataset="held", do_eval=True, do_train=True, max_steps=6, regression_report=True, pref_ftx=0.5)
    run(cfg)
    return Path(str(cfg.train.output_dir))

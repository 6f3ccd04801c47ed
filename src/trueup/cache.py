"""Where this machine keeps what is dear to make or fetch twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`TRUEUP_CACHE`, or ~/.cache/trueup; it need not be there yet."""
    return Path(os.environ.get("TRUEUP_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "trueup"))

"""Makes `toy_program` importable from every test of this folder, in this process and in children."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

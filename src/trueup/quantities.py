"""Sizes and times as people read them. Torch-free."""

from __future__ import annotations


def sized(size: float) -> str:
    """Bytes: `12 B`, `850 KB`, `12 MB`, `3.4 GB`."""
    for unit, of in (("GB", 1024**3), ("MB", 1024**2)):
        if size >= of:
            return f"{size / of:.3g} {unit}" if size < 1000 * of else f"{size / of:,.0f} {unit}"
    return f"{size / 1024:.0f} KB" if size >= 1024 else f"{size:.0f} B"


def lasting(seconds: float) -> str:
    """A time: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

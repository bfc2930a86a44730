"""Quantities in the unit that a reader would take."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A time: 99 s, 2 min, 1.7 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """A number of bytes: 512 MiB, 1.5 GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"

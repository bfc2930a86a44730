"""Files that several processes may want at once: one makes them, the others wait and find them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from orca_rank.artifacts.lock import locked


@contextlib.contextmanager
def making(path: Path) -> Iterator[Path]:
    """Be the only process that makes `path` while the block runs; whoever waited must look again whether it is there.

    Yields a folder beside it for what is half made: it stays where the block fails, for the next process to go on from,
    and is removed otherwise.
    """
    parts = path.with_suffix(".parts")
    with locked(parts, wait=True):
        yield parts
        shutil.rmtree(parts, ignore_errors=True)  # the lock with it: whoever comes now finds the file

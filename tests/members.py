"""What processes that a test starts do; without torch, so that they start at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def work(folder: str, do: str) -> None:
    """Write a file named by the rank; then process 1 does as the test asks, and the others wait for it in vain."""
    rank = os.environ["RANK"]
    (Path(folder) / rank).write_text(f"{os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']}")
    if do == "end":
        return
    if rank == "1":
        if do == "raise":
            raise ValueError("one of two")
        os.kill(os.getpid(), getattr(signal, do))
    time.sleep(60)


def report(error: Exception) -> tuple[str, str, bool]:
    return str(error), f"error: {error}", True

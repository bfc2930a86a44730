"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None  # type: ignore[assignment]  # where the module exists it is one

LOCK = ".lock"
WAIT = "ORCA_RANK_WAIT"
log = logging.getLogger("orca_rank.lock")


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool | None = None) -> Iterator[None]:
    """Hold a folder while the block runs; the operating system lets it go when the process dies, however it dies.

    Args:
        folder: made if it is not there. wait: until another process has let it go, instead of the error; null: as the
            environment variable ORCA_RANK_WAIT says, which is set for the points of a sweep that run beside each other.

    Raises:
        BlockingIOError: another process holds it; says which.
    """
    handle, made = _hold(folder, bool(os.environ.get(WAIT)) if wait is None else wait)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # where nothing was written, no trace is left
            for place in made:
                place.rmdir()
        os.close(handle)


def _hold(folder: Path, wait: bool) -> tuple[int, list[Path]]:
    """A handle of the folder's lock, and the folders that were made for it, inner ones first."""
    path = folder / LOCK
    while True:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the owner before has made it and removes it this moment
            continue
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            said = f"{path.parent} is being written by {owner}"
            if not wait:
                os.close(handle)
                raise BlockingIOError(f"{said}: wait for it or stop it, or add run=<another name>") from None
            log.warning("%s: waiting for it", said)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a filesystem without locks
            pass
        # The owner before may have removed the very file that was waited for: then it is made anew.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)
    os.truncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}".encode(), 0)
    return handle, made

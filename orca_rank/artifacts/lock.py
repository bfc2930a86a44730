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
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder while the block runs; the operating system lets it go when the process dies, however it dies.

    Args:
        folder: made if it is not there. wait: until another process has let it go, instead of the error; also with the
            environment variable ORCA_RANK_WAIT, which is set for the points of a sweep that run beside each other.

    Raises:
        BlockingIOError: another process holds it; says which.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    handle = _hold(path, wait or bool(os.environ.get(WAIT)))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):  # where nothing was written, no trace is left
            for place in made:
                place.rmdir()


def _hold(path: Path, wait: bool) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the owner before has removed the folder
            path.parent.mkdir(parents=True, exist_ok=True)
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
        if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
            break
        os.close(handle)
    os.truncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}".encode(), 0)
    return handle

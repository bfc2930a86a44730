"""A GPU of its own for each process that runs points of a sweep beside others on a machine with several."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None  # type: ignore[assignment]  # where the module exists it is one

VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: list[int] = []  # locks, until the process ends


def take_one(trainer: Mapping[str, Any], folder: Path | None = None) -> None:
    """See from now on only one of the GPUs that this process sees: the first that no other process has taken so, or
    else one of those that the fewest have.

    It is kept until the process ends, not the point: what the allocator has cached of one point stays on the GPU. To be
    called before anything is computed on a GPU; nothing happens where there are not several, or the options of the
    trainer ask for other than one.

    Args:
        folder: of the locks; by default one of this user and machine among the temporary files.
    """
    one = (str(trainer.get("devices", 1)), trainer.get("num_nodes", 1)) == ("1", 1)
    if not one or trainer.get("accelerator", "auto") not in ("auto", "gpu", "cuda") or fcntl is None:
        return
    import torch  # here, because it takes seconds

    count = torch.cuda.device_count()  # asks the driver's library; CUDA itself reads the variable later
    if count < 2 or torch.cuda.is_initialized() or torch.version.hip is not None:
        return
    seen = os.environ.get(VISIBLE)
    names = [str(i) for i in range(count)] if seen is None else [name.strip() for name in seen.split(",")][:count]
    if folder is None:
        folder = Path(tempfile.gettempdir()) / f"orca_rank-gpus-{os.getuid()}-{platform.node()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[VISIBLE] = _free(names, folder)
    except OSError:  # no place for locks: all see all, and use the first
        return


def _free(names: list[str], folder: Path) -> str:
    """The first free GPU, held from now on; `<name>.1` is the lock of the second process that shares it, and so on."""
    others = 0
    while True:
        for name in names:
            handle = os.open(folder / f"{name}.{others}", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                continue
            except OSError:  # a filesystem without locks
                os.close(handle)
                raise
            _held.append(handle)
            return name
        others += 1

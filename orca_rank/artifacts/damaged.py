"""One error for every file that is not what its name says, whatever its reader's own error would have been."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path


class DamagedFile(ValueError):
    """A file that cannot be read as what it should be; the message names the file and what mends it."""


@contextlib.contextmanager
def reading(path: Path, mend: str, what: str = "") -> Iterator[None]:
    """Turn whatever a reader raises over a file's bytes into `DamagedFile`: "cannot read <path> (…): <mend>".

    Damaged bytes reach readers' code in every way there is, so no list of exceptions is complete; the block should
    hold the reading alone. `DamagedFile` and a file that is missing come through as they are.

    Args:
        mend: the command or option that mends it. what: a word or two before the path, such as "the image ".

    Raises:
        DamagedFile: from any other exception.
    """
    try:
        yield
    except (DamagedFile, FileNotFoundError):
        raise
    except Exception as error:
        lines = str(error).splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise DamagedFile(f"cannot read {what}{path} ({reason}): {mend}") from error


def limit_bytes() -> int:
    """The largest array that is read, in bytes: 8 GiB, or ORCA_RANK_MAX_GIB."""
    text = os.environ.get("ORCA_RANK_MAX_GIB", "8")
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise ValueError(f"ORCA_RANK_MAX_GIB must be a number above 0, received {text!r}")
    return int(limit * 2**30)


def check_size(path: Path, name: str, shape: Sequence[int], itemsize: int) -> None:
    """Refuse an array for the size that its header declares, before anything of that size is allocated.

    Raises:
        DamagedFile: for more than `limit_bytes`, or a negative length.
    """
    size, limit = math.prod(shape) * itemsize, limit_bytes()
    if size > limit or min(shape, default=0) < 0:
        raise DamagedFile(
            f"{path} declares {name} of shape {tuple(shape)}, {size / 2**30:,.1f} GiB: more than the limit of "
            f"{limit / 2**30:g} GiB; set the environment variable ORCA_RANK_MAX_GIB higher if it really is that large"
        )

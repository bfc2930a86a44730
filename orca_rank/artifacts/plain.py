"""What torch.save wrote, read without running code that a file may hold."""

from __future__ import annotations

import _codecs
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def check_sums(path: Path) -> None:
    """Raise a ValueError where a byte of what torch.save wrote has changed since; torch.load does not look."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} in it is not what was written")


def load_plain(path: Path, records: Sequence[type] = ()) -> Any:
    """Tensors (on the CPU), NumPy arrays, plain values and instances of `records`; anything else is an error.

    Args:
        records: classes that are filled with what the file says of them, none of their own code being run.
    """
    array = np.zeros(1)
    scalar = array[0].__reduce__()[0]
    numpy = [array.__reduce__()[0], scalar, np.ndarray, np.dtype, _codecs.encode]
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?SU"}
    with torch.serialization.safe_globals([*numpy, *kinds, *records]):
        return torch.load(path, map_location="cpu", weights_only=True)

"""Class labels as files hold them, to 0, 1, …: by number, by name, one-hot; and what cannot be meant is refused."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

Class = int | str


class Labels(NamedTuple):
    """y (n,) int64 from 0; classes: what the file calls them, in order."""

    y: Int[np.ndarray, " n"]
    classes: tuple[Class, ...]


def class_labels(y: np.ndarray, name: str, classes: Sequence[Class] | None = None) -> Labels:
    """Labels as 0, 1, …, in the order of their values.

    Whole numbers, whole floats, booleans and strings, of shape (n,) or (n, 1), and one-hot rows (n, k) are taken.

    Args:
        y: as the file has it. name: for messages.
        classes: the classes that there are, where that is known from the training data; None: those found, and at
            least two.

    Raises:
        ValueError: for anything that is not unambiguous, or a label that is none of `classes`.
    """
    if y.ndim == 2 and y.shape[1] > 1:
        values = _one_hot(y, name)
        found: list[Class] = list(range(y.shape[1]))
        if classes is not None and list(classes) != found:
            raise ValueError(f"{name} is one-hot with {len(found)} columns, the classes so far are {_some(classes)}")
    else:
        values = _values(y.reshape(len(y)), name)
        found = np.unique(values).tolist()
    if classes is None:
        present = set(np.unique(values).tolist())
        found = [label for label in found if label in present]
        _check_classes(found, len(y), name)
        classes = found
    place = {label: number for number, label in enumerate(classes)}
    known, where = np.unique(values, return_inverse=True)
    if unknown := [label for label in known.tolist() if label not in place]:
        raise ValueError(
            f"class labels {name} have classes that the training data lack: {_some(unknown)}; those known are "
            f"{_some(classes)}"
        )
    return Labels(np.array([place[label] for label in known.tolist()], dtype=np.int64)[where], tuple(classes))


def renamed(classes: Sequence[Class]) -> bool:
    """Whether classes are called otherwise than 0, 1, …."""
    return list(classes) != list(range(len(classes)))


def renaming(classes: Sequence[Class], name: str) -> str:
    """A sentence on what classes are called."""
    return f"class labels {name} are {_some(classes)}: taken as the classes 0 … {len(classes) - 1} in this order"


def check_counts(y: Int[np.ndarray, " n"], classes: Sequence[Class], least: int, name: str) -> None:
    """Refuse classes too small to stand in every part.

    Raises:
        ValueError: naming the classes with fewer than `least` samples.
    """
    counts = np.bincount(y, minlength=len(classes))
    if (small := np.flatnonzero(counts < least)).size:
        shown = ", ".join(f"{classes[i]!r} ({counts[i]})" for i in small[:8])
        raise ValueError(
            f"class labels {name} have {len(small)} class(es) of fewer than {least} samples: {shown}"
            f"{', …' if len(small) > 8 else ''}; a class needs {least}, to be trained on and measured: give more "
            f"samples, join classes or leave these out"
            + (". Numbers to be predicted as such are a regression: set data.task=regression" if len(small) > 8 else "")
        )


def _one_hot(y: np.ndarray, name: str) -> Int[np.ndarray, " n"]:
    if y.dtype.kind not in "biuf":
        raise ValueError(
            f"class labels {name} have shape {y.shape} and dtype {y.dtype}: expected (n,), or one-hot (n, k)"
        )
    ones = (y == 1).sum(1)
    valid = (ones == 1) & ((y == 0).sum(1) == y.shape[1] - 1)
    if not valid.all():
        bad = int(np.flatnonzero(~valid)[0])
        raise ValueError(
            f"class labels {name} have shape {y.shape} but are not one-hot: row {bad} has {ones[bad]} ones; expected "
            f"integer labels (n,), or exactly one 1 among zeros in every row"
        )
    return y.argmax(1).astype(np.int64)


def _values(y: np.ndarray, name: str) -> np.ndarray:
    """Labels (n,) as int64 or strings."""
    kind = y.dtype.kind
    if kind == "S":
        try:
            return np.char.decode(y, "utf-8")
        except UnicodeDecodeError:  # one letter a byte: no two names become one
            return np.char.decode(y, "latin-1")
    if kind == "U":
        return y
    if kind not in "biuf":
        raise ValueError(f"class labels {name} have dtype {y.dtype}: expected integer labels, whole floats or strings")
    if kind == "f":
        fractional = ~(np.isfinite(y) & (y == np.floor(y)) & (abs(y) < 2**53))
        if fractional.any():
            bad = int(np.flatnonzero(fractional)[0])
            raise ValueError(
                f"targets {name} have shape {y.shape} and dtype {y.dtype}: expected integer labels (n,) for "
                f"classification, but number {bad} is {y[bad]}; numbers to be predicted as such are a regression "
                f"(data.task=regression), where data.fill=nan marks missing ones"
            )
    if kind == "u" and len(y) and y.max() > np.iinfo(np.int64).max:
        raise ValueError(f"class labels {name} are as large as {y.max()}: expected numbers below 2^63")
    return y.astype(np.int64)


def _check_classes(found: Sequence[Class], count: int, name: str) -> None:
    if len(found) < 2:
        raise ValueError(f"class labels {name} are all {found[0] if found else '-'}: expected at least 2 classes")
    numbers = [label for label in found if not isinstance(label, str)]
    if numbers and min(numbers) < 0 and numbers != [-1, 1]:
        raise ValueError(
            f"class labels {name} must be 0, 1, …; the smallest is {min(numbers)}. If it marks samples without a "
            f"label, leave those out; where it marks such pixels of a segmentation, set data.fill={min(numbers)}"
        )


def _some(classes: Sequence[Class]) -> str:
    """A few of the classes in words."""
    numbers = [label for label in classes if not isinstance(label, str)]
    if len(numbers) == len(classes) > 3 and all(b - a == 1 for a, b in pairwise(numbers)):
        return f"{numbers[0]} … {numbers[-1]}"
    shown = [repr(label) if isinstance(label, str) else str(label) for label in classes]
    return ", ".join(shown) if len(shown) <= 8 else f"{', '.join(shown[:6])}, …, {shown[-1]} ({len(shown)} of them)"

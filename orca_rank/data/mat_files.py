"""Darcy's official .mat files, versions 5 and 7.3, and HDF5 files of the same arrays that Python wrote."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float

from orca_rank.artifacts.damaged import DamagedFile, check_size, reading
from orca_rank.data import mat5
from orca_rank.data.fields import kept

NAMES = ("coeff", "sol")
_MEND = "unpack or download it again, or use data=darcy, which makes equivalent data"
_NO_MAT = f"it is not a whole MATLAB file of version 5 or 7.3; {_MEND}"


def read_fields(
    path: Path, stride: int, limit: int | None
) -> tuple[Float[np.ndarray, "n k k"], Float[np.ndarray, "n k k"]]:
    """coeff and sol of the first `limit` samples at every `stride`-th point, float32 where that is precise enough.

    Both are (n, s, s) in MATLAB's order of axes, which version 7.3 stores reversed.

    Raises:
        FileNotFoundError: no such file. DamagedFile: one that cannot be read. ValueError: without these arrays or n
            samples of them, or with NaN.
    """
    _there(path)
    read = _read_hdf5 if h5py.is_hdf5(path) else _read_version_5
    a, u = read(path, stride, limit)
    if a.shape != u.shape or a.shape[1] != a.shape[2]:
        raise ValueError(f"{path}: expected coeff and sol of one shape (n, s, s), received {a.shape} and {u.shape}")
    if limit is not None and len(a) < limit:
        raise ValueError(f"{path} holds {len(a)} samples, {limit} were asked for: lower train_limit or test_limit")
    return _single(a, f"{NAMES[0]!r} of {path}"), _single(u, f"{NAMES[1]!r} of {path}")


def grid_of(path: Path) -> int:
    """Points per side s of the arrays in a file, without reading them; errors as `read_fields`."""
    _there(path)
    if h5py.is_hdf5(path):
        with reading(path, _MEND), h5py.File(path, "r") as file:
            return sorted(_dataset(path, file, NAMES[0]).shape)[1]  # (n, s, s) in any order: s is there twice
    with reading(path, _NO_MAT):
        shapes = mat5.shapes(path)
    shape = shapes.get(NAMES[0]) or ()
    if len(shape) != 3:
        raise _without(path, NAMES[0], shapes)
    return sorted(shape)[1]


def _read_hdf5(path: Path, stride: int, limit: int | None) -> list[np.ndarray]:
    keep = slice(None, None, stride)
    with reading(path, _MEND), h5py.File(path, "r") as file:
        items = [_dataset(path, file, name) for name in NAMES]
        reverse = [_reversed(item, _by_matlab(path, item)) for item in items]
        if None in reverse:  # as many samples as points, and nothing says whose order of axes
            reverse = [_rougher_last(items[1][()])] * 2
        return [
            np.transpose(item[:, :, :limit][keep, keep], (2, 1, 0)) if turned else item[:limit][:, keep, keep]
            for item, turned in zip(items, reverse, strict=True)
        ]


def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    item = file.get(name)
    if not isinstance(item, h5py.Dataset) or item.ndim != 3 or item.dtype.kind not in "biuf":
        raise _without(path, name, file.keys())
    check_size(path, repr(name), item.shape, item.dtype.itemsize)
    return item


def _by_matlab(path: Path, item: h5py.Dataset) -> bool:
    """Whether MATLAB wrote a dataset, or someone who marks it as MATLAB does."""
    with open(path, "rb") as stream:
        return "MATLAB_class" in item.attrs or stream.read(10) == b"MATLAB 7.3"


def _reversed(item: h5py.Dataset, by_matlab: bool) -> bool | None:
    """Whether the samples are along the last axis; None where neither the shape nor the writer says."""
    first, second, third = item.shape
    if first == second == third:
        return by_matlab or None
    return first == second


def _rougher_last(u: np.ndarray) -> bool:
    """Whether neighbours along the last axis differ more than along the first: samples do, points do not.

    Solutions of Darcy flow differ 1.4 times as much between samples as between 9 points, 2.6 times at 25, 4.2 at 41.
    """
    first, last = (float(np.abs(np.diff(u, axis=axis)).mean()) for axis in (0, 2))
    return last > 1.25 * first


def _read_version_5(path: Path, stride: int, limit: int | None) -> list[np.ndarray]:
    with reading(path, _NO_MAT):
        content = mat5.read(path, NAMES)
    for name in NAMES:
        if name not in content or content[name].ndim != 3:
            raise _without(path, name, content)
    return [content[name][:limit, ::stride, ::stride] for name in NAMES]


def _without(path: Path, name: str, found: Iterable[str]) -> DamagedFile:
    return DamagedFile(f"{path} has no three-dimensional {name!r}; it holds {sorted(found)}: {_MEND}")


def _single(x: np.ndarray, name: str) -> np.ndarray:
    """float32, or float64 where float32 costs precision; NaN and infinite values are errors."""
    tensor = kept(x[:, None], None, name, "data.fill", "pixel")[:, 0]
    return (tensor if tensor.is_floating_point() else tensor.float()).numpy()


def _there(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: put the official piececonst_r421_N1024_smooth1.mat and …smooth2.mat into the folder "
            f"paths.data (or ORCA_RANK_DATA), or use data=darcy, which makes equivalent data"
        )

"""Reading inputs and targets from npz, npy, h5 and pt files."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

FORMATS = "x and y in one .npz, .h5/.hdf5 or .pt file, or a pair [x.npy, y.npy]"


def read_arrays(
    root: Path, files: str | Sequence[str], x: str, y: str | None
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Inputs, targets (None if y is None) and a name for error messages.

    Args:
        root: folder that relative names are relative to.
        files: one npz, h5 or pt file (a dictionary of tensors), or a pair of npy files.
        x, y: names of the two arrays inside the file.

    Raises:
        FileNotFoundError: for a missing file. KeyError: for a missing array. ValueError: for a file that cannot be
            read, holds Python objects, or has another format.
    """
    if not isinstance(files, str):
        if len(files) != 2 or not all(name.endswith(".npy") for name in files):
            raise ValueError(f"expected {FORMATS}; received {list(files)}")
        pair = [_read(root / name, []) for name in files]
        return pair[0][""], pair[1][""] if y is not None else None, " and ".join(files)
    if files.endswith(".npy"):
        raise ValueError(f"one .npy file is not enough, expected {FORMATS}; received {files!r}")
    arrays = _read(root / files, [x] if y is None else [x, y])
    return arrays[x], None if y is None else arrays[y], files


def _read(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: set paths.data (or ORCA_RANK_DATA) to the folder that holds it, or give its full path"
        )
    try:
        if path.suffix == ".npy":
            arrays = {"": np.load(path, allow_pickle=False)}
        elif path.suffix == ".npz":
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in _present(path, list(file.files), names)}
        elif path.suffix in (".h5", ".hdf5"):
            with h5py.File(path, "r") as file:
                arrays = {name: np.asarray(file[name][()]) for name in _present(path, list(file.keys()), names)}
        elif path.suffix in (".pt", ".pth"):
            content = _load_tensors(path)
            if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
                raise ValueError("it does not hold a dictionary of tensors")
            found = {str(key): value for key, value in content.items()}
            arrays = {name: _as_numpy(found[name]) for name in _present(path, list(found), names)}
        else:
            raise ValueError(f"unknown format {path.suffix!r}; expected {FORMATS}")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return arrays


def _load_tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(f"it is damaged, or holds more than tensors ({type(error).__name__})") from error


def _present(path: Path, found: list[str], wanted: list[str]) -> list[str]:
    for name in wanted:
        if name not in found:
            raise KeyError(f"{path} has no array {name!r}; it holds {sorted(found)}: set the option x or y to its name")
    return wanted


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()

"""Reading named arrays from npz, npy, h5, zarr and pt files that may be damaged, hostile or larger than they look."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orca_rank.artifacts.damaged import DamagedFile, check_size, reading
from orca_rank.artifacts.plain import load_plain
from orca_rank.data.groups import MissingArray, by_rows, fits, read_h5, read_zarr
from orca_rank.data.stored import MEND, NpyRows, Rows

FORMATS = "x and y in one .npz, .h5/.hdf5 or .pt file or .zarr folder, or a pair [x.npy, y.npy]"


def read_arrays(
    root: Path,
    files: str | Sequence[str],
    x: str,
    y: str | None,
    *,
    optional: bool = False,
    in_memory: bool | None = True,
    fill: Sequence[float] | None = (),
) -> tuple[np.ndarray | Rows, np.ndarray | Rows | None, str]:
    """Inputs, targets (None if y is None) and a name for error messages.

    Args:
        root: folder that relative names are relative to.
        files: one npz, h5 or pt file (a dictionary of tensors) or zarr folder, or a pair of npy files.
        x, y: names of the two arrays inside the file; train/x is x in the group train.
        optional: do without y where the file has none; x may then be one npy file.
        in_memory: False leaves numbers of npy, h5 and zarr files on disk, None those of more than IN_MEMORY bytes
            together. A member of an npz or pt file cannot be read by rows.
        fill: values that mark missing ones, see `orca_rank.data.fields.kept`: those that an HDF5 or zarr array says it
            has must be among them.

    Raises:
        FileNotFoundError: for a missing file. KeyError: for a missing array. ValueError: for another format.
        ModuleNotFoundError: for zarr where it is not installed.
        DamagedFile: for a file that cannot be read, holds Python objects, or declares an array beyond the limit.
    """
    single = files if isinstance(files, str) else files[0] if len(files) == 1 else None
    if single is not None and single.endswith(".npy") and (optional or y is None):
        path = _there(root / single)
        return read_npy(path, fits(in_memory, [path.stat().st_size])), None, single
    if not isinstance(files, str):
        if len(files) != 2 or not all(name.endswith(".npy") for name in files):
            raise ValueError(f"expected {FORMATS}; received {list(files)}")
        paths = [_there(root / name) for name in files][: 1 if y is None else 2]
        whole = fits(in_memory, (path.stat().st_size for path in paths))
        read_ones = [read_npy(path, whole) for path in paths]
        return read_ones[0], None if y is None else read_ones[1], " and ".join(files)
    if files.endswith(".npy"):
        raise ValueError(f"one .npy file is not enough, expected {FORMATS}; received {files!r}")
    reader = READERS.get((root / files).suffix.lower())
    if reader is None:
        raise ValueError(f"cannot read {root / files}: unknown format {(root / files).suffix!r}; expected {FORMATS}")
    path = _there(root / files)
    grouped = reader in (read_h5, read_zarr)
    if in_memory is False and not grouped:
        raise ValueError(
            f"{path} cannot be read by rows, as data.in_memory=false asks: save x and y as npy, h5 or zarr files"
        )
    options: dict[str, Any] = {"in_memory": in_memory, "fill": fill} if grouped else {}
    read = partial(reader, **options)
    names = [x] if y is None else [x, y]
    try:
        arrays = read(path, names)
    except MissingArray as error:
        if not (optional and error.name == y):
            raise
        arrays = read(path, [x])
    return arrays[x], None if y is None else arrays.get(y), files


def read_npy(path: Path, in_memory: bool = True) -> np.ndarray | Rows:
    """The array of an npy file, no larger than the limit and without Python objects, or its rows."""
    with reading(path, MEND), open(path, "rb") as stream:
        shape, fortran, dtype = _header(path, "its array", stream)
        if not fortran and by_rows(shape, dtype, in_memory):
            return NpyRows(path, shape, dtype, stream.tell())
        check_size(path, "its array", shape, dtype.itemsize)
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)


def read_npz(path: Path, names: Sequence[str], mend: str = MEND) -> dict[str, np.ndarray]:
    """The named arrays of an npz file, each no larger than the limit and without Python objects.

    Raises:
        MissingArray: for one that is not there. DamagedFile: see `reading`, with what mends it.
    """
    with reading(path, mend):
        archive = zipfile.ZipFile(path)
    with archive:
        found = {name.removesuffix(".npy"): name for name in archive.namelist()}
        for name in names:
            if name not in found:
                raise MissingArray(path, name, list(found))
        arrays = {}
        for name in names:
            with reading(path, mend):
                entry = archive.getinfo(found[name])
                with archive.open(entry) as stream:
                    size = _check_header(path, repr(name), stream)
                    if entry.file_size != stream.tell() + size:
                        raise ValueError(f"{name!r} is not as long as its header says")
                with archive.open(entry) as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
                    stream.read(1)  # the end, where the checksum is looked at
        return arrays


def read_pt(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named tensors or NumPy arrays of a dictionary, whatever else of plain values it holds; nothing is executed.

    A name like train/x is x in the dictionary train.
    """
    with reading(path, f"save a dictionary of tensors with torch.save, or {MEND}"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            check_size(path, "tensors", (size,), 1)
        content = load_plain(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dictionary of tensors")
    arrays = {}
    for name in names:
        value = _entry(content, name)
        if value is None:
            raise MissingArray(path, name, _entries(content))
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise DamagedFile(f"cannot read {path}: {name!r} is a {type(value).__name__}, not a tensor: {MEND}")
        with reading(path, MEND):
            size = value.itemsize if isinstance(value, np.ndarray) else value.element_size()
            check_size(path, repr(name), value.shape, size)  # a view may be larger than what it looks at
            arrays[name] = value if isinstance(value, np.ndarray) else _as_numpy(value)
    return arrays


READERS: dict[str, Callable[[Path, Sequence[str]], Any]] = {
    ".npz": read_npz,
    ".h5": read_h5,
    ".hdf5": read_h5,
    ".zarr": read_zarr,
    ".pt": read_pt,
    ".pth": read_pt,
}


def _there(path: Path) -> Path:
    if not (path.is_dir() if path.suffix.lower() == ".zarr" else path.is_file()):
        raise FileNotFoundError(
            f"{path} is missing: set paths.data (or ORCA_RANK_DATA) to the folder that holds it, or give its full path"
        )
    return path


def _header(path: Path, name: str, stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an array in the npy format; the stream is then at its first byte."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} has version {version} of the npy format, expected 1 or 2")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not loaded: save numbers or strings")
    return shape, fortran, dtype


def _check_header(path: Path, name: str, stream: Any) -> int:
    """Bytes of such an array, after a look at its shape and dtype."""
    shape, _, dtype = _header(path, name, stream)
    check_size(path, name, shape, dtype.itemsize)
    return math.prod(shape) * dtype.itemsize


def _entry(content: Mapping[Any, Any], name: str) -> Any:
    if name in content:
        return content[name]
    first, _, rest = name.partition("/")
    inner = content.get(first)
    return _entry(inner, rest) if rest and isinstance(inner, dict) else None


def _entries(content: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Names of all tensors in a dictionary of dictionaries."""
    names = []
    for name, value in content.items():
        if isinstance(value, dict):
            names += _entries(value, f"{prefix}{name}/")
        elif isinstance(value, torch.Tensor | np.ndarray):
            names.append(f"{prefix}{name}")
    return names


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"a tensor of layout {tensor.layout} and dtype {tensor.dtype}, expected plain numbers")
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

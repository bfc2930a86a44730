"""Named arrays of HDF5 files and zarr groups: whole, or the rows that stay there."""

from __future__ import annotations

import base64
import importlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from orca_rank.artifacts.damaged import DamagedFile, check_size, reading
from orca_rank.data.stored import IN_MEMORY, MEND, H5Rows, Rows, ZarrRows

NEUTRAL = {"scale_factor": 1, "add_offset": 0}  # attributes of netCDF, and what changes nothing
Found = dict[str, np.ndarray | Rows]


class MissingArray(KeyError):
    """A file without an array of that name."""

    def __init__(self, path: Path, name: str, found: Sequence[str]) -> None:
        super().__init__(
            f"{path} has no array {name!r}; it holds {sorted(found)[:20]}: set the option x or y to its name"
        )
        self.name = name


def fits(in_memory: bool | None, sizes: Iterable[int]) -> bool:
    """Whether arrays of so many bytes are to be read whole."""
    return sum(sizes) <= IN_MEMORY if in_memory is None else in_memory


def by_rows(shape: Sequence[int], dtype: np.dtype, in_memory: bool) -> bool:
    """Whether an array can be read by rows, where it is not to be read whole."""
    return not in_memory and dtype.kind in "biuf" and len(shape) > 1


def read_h5(
    path: Path, names: Sequence[str], in_memory: bool | None = True, fill: Sequence[float] | None = ()
) -> Found:
    """The named datasets of an HDF5 file, each no larger than the limit, or its rows; strings as NumPy strings.

    What the attributes of netCDF say of the numbers is not passed over: packed ones are refused, and so are those that
    stand for missing ones, unless `fill` has them or is None.
    """
    with reading(path, MEND):
        file = h5py.File(path, "r")
    with file:
        items: dict[str, h5py.Dataset] = {}
        for name in names:
            with reading(path, MEND):
                items[name] = file.get(name)
            if not isinstance(items[name], h5py.Dataset):
                raise MissingArray(path, name, h5_names(path, file))
        arrays: Found = {}
        with reading(path, MEND):
            if empty := [name for name, item in items.items() if item.shape is None]:
                raise ValueError(f"{empty[0]!r} is empty")
            whole = fits(in_memory, (item.nbytes for item in items.values()))
            for name, item in items.items():
                chunk = item.chunks if item.compression else None  # only what is compressed is read by whole chunks
                text = h5py.check_string_dtype(item.dtype) is not None
                values, rows = item.asstr() if text else item, H5Rows(path, item)
                arrays[name] = _numbers(rows, name, values, item.attrs, whole, fill, chunk=chunk, text=text)
        return arrays


def h5_names(path: Path, file: h5py.File) -> list[str]:
    """Full names of all datasets of an HDF5 file."""
    names: list[str] = []
    with reading(path, MEND):
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def read_zarr(
    path: Path, names: Sequence[str], in_memory: bool | None = True, fill: Sequence[float] | None = ()
) -> Found:
    """The named arrays of a zarr group in a folder, formats 2 and 3, as `read_h5` those of a file.

    Raises:
        ModuleNotFoundError: without the package zarr.
    """
    try:
        zarr: Any = importlib.import_module("zarr")
    except ImportError as error:
        raise ModuleNotFoundError(
            f'{path} needs the package zarr (3 or later), which is not installed: pip install "orca_rank[zarr]", or '
            f"{MEND}"
        ) from error
    with reading(path, MEND):
        group = zarr.open_group(path, mode="r")
    items: dict[str, Any] = {}
    for name in names:
        with reading(path, MEND):
            items[name] = group.get(name)
        if not isinstance(items[name], zarr.Array):
            with reading(path, MEND):
                found = [one for one, member in group.members(max_depth=None) if isinstance(member, zarr.Array)]
            raise MissingArray(path, name, found)
    arrays: Found = {}
    with reading(path, MEND):
        whole = fits(in_memory, (item.nbytes for item in items.values()))
        for name, item in items.items():
            _check_codecs(path, name, item.metadata.to_dict())
            rows, text = ZarrRows(path, name, item), item.dtype.kind in "OT"
            arrays[name] = _numbers(rows, name, item, _as_netcdf(item), whole, fill, chunk=item.chunks, text=text)
    return arrays


def _numbers(
    rows: Rows,
    name: str,
    item: Any,
    attributes: Mapping[str, Any],
    in_memory: bool,
    fill: Sequence[float] | None,
    *,
    chunk: Sequence[int] | None,
    text: bool,
) -> np.ndarray | Rows:
    """What `item[()]` gives, or its rows, after a look at its size and at what its attributes say of its values.

    Args:
        chunk: shape of what is read at once at least, where there is such. text: whether these are strings.
    """
    packed = {one: attributes[one] for one in NEUTRAL if attributes.get(one, NEUTRAL[one]) != NEUTRAL[one]}
    if packed:
        raise ValueError(f"{name!r} is packed by its attributes {packed}, which are not undone here")
    if chunk is not None:
        check_size(rows.path, f"a chunk of {name!r}", chunk, rows.dtype.itemsize)
    if by_rows(rows.shape, rows.dtype, in_memory):
        if chunk is not None and math.prod(chunk) * rows.dtype.itemsize > IN_MEMORY:
            raise ValueError(
                f"{name!r} is stored in chunks {tuple(chunk)} of more than 512 MiB, each read for any row of "
                f"it: write it in chunks of fewer rows"
            )
        _check_marks(name, attributes, rows.sample, fill)
        return rows
    check_size(rows.path, repr(name), rows.shape, rows.dtype.itemsize)
    values = np.asarray(item[()], dtype=str if text else None)
    if not text:
        _check_marks(name, attributes, values, fill)
    return values


def _check_marks(name: str, attributes: Mapping[str, Any], values: np.ndarray, fill: Sequence[float] | None) -> None:
    """Refuse numbers that the array's own attributes take for missing ones, and `fill` does not."""
    for mark in ("_FillValue", "missing_value"):
        for value in np.ravel(attributes.get(mark, ())):
            if fill is None or value in fill or value.dtype.kind not in "iuf":
                continue
            if count := int((values == value).sum()):
                raise ValueError(
                    f"{name!r} holds {count} values {value:g}, which its attribute {mark} takes for missing ones: set "
                    f"data.fill={value:g}, or data.fill=none if they are values like the others"
                )


def _as_netcdf(item: Any) -> dict[str, Any]:
    """Attributes of a zarr array as netCDF would have them, by what xarray makes of these.

    Format 2 has `_FillValue` as its own fill value, where xarray has written the array (it names the dimensions then):
    anyone else's says only what is not stored. Format 3 has it as an attribute, a float as the base64 of 8 bytes.
    """
    attributes = dict(item.attrs)
    if "_ARRAY_DIMENSIONS" in attributes and item.metadata.zarr_format == 2 and item.fill_value is not None:
        attributes["_FillValue"] = item.fill_value
    mark = attributes.get("_FillValue")
    if isinstance(mark, str) and item.dtype.kind == "f":
        (attributes["_FillValue"],) = struct.unpack("<d", base64.standard_b64decode(mark))
    return attributes


def _check_codecs(path: Path, name: str, metadata: Mapping[str, Any]) -> None:
    """Refuse an array whose chunks are Python objects: reading them would run what they say."""
    written = [metadata.get(place) for place in ("codecs", "filters", "compressor")]
    if "pickle" in repr(written).lower():
        raise DamagedFile(f"cannot read {path}: {name!r} holds Python objects (pickles), which are not loaded: {MEND}")

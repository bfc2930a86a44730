"""Arrays that stay on disk: rows of npy, HDF5 and zarr files, read as they are asked for."""

from __future__ import annotations

import importlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from orca_rank.artifacts.damaged import reading
from orca_rank.scoring import norms_of

IN_MEMORY = 2**29  # bytes of x and y together up to which they are read whole, unless data.in_memory says otherwise
SAMPLE = 2**25  # bytes of the rows by which such an array is judged: its kind, its layout, its fill values
GAP = 4  # rows apart that are read at once, and what lies between them with them
CHUNK = 2**21  # values of a part in a pass over all rows
MEND = "write it again, or set data.train (source.train, data.test) to another file"


class Rows(ABC):
    """An array (n, ...) in a file.

    Attributes: shape, dtype, ndim, as of an array.
    """

    def __init__(self, path: Path, shape: Sequence[int], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype, self.ndim = path, tuple(shape), dtype, len(shape)

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop − 1."""

    def take(self, index: Int[np.ndarray, " k"]) -> np.ndarray:
        """Rows in any order, read in runs of neighbours."""
        order = np.argsort(index, kind="stable")
        found = np.empty((len(index), *self.shape[1:]), self.dtype)
        ends = [0, *(np.flatnonzero(np.diff(index[order]) > GAP) + 1).tolist(), len(index)] if len(index) else []
        with reading(self.path, MEND):
            for first, last in pairwise(ends):
                places = order[first:last]
                start = int(index[places[0]])
                found[places] = self.read(start, int(index[places[-1]]) + 1)[index[places] - start]
        return found

    @cached_property
    def sample(self) -> np.ndarray:
        """Evenly spaced rows of SAMPLE bytes in all, at least two; kept, since each may cost a chunk of the file."""
        row = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        places = np.linspace(0, len(self) - 1, max(2, min(len(self), SAMPLE // row)))
        return self.take(np.unique(places.astype(np.int64)))


class NpyRows(Rows):
    """Those of an npy file in C order, whose numbers begin at byte `offset`.

    They are read, not mapped: a pass over a mapped file leaves all of it in the resident memory of the process.
    """

    def __init__(self, path: Path, shape: Sequence[int], dtype: np.dtype, offset: int) -> None:
        super().__init__(path, shape, dtype)
        self.offset, self.bytes = offset, math.prod(shape[1:]) * dtype.itemsize
        if os.path.getsize(path) < offset + len(self) * self.bytes:
            raise ValueError("it is shorter than its header says")

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.fromfile(
            self.path, self.dtype, (stop - start) * math.prod(self.shape[1:]), offset=self.offset + start * self.bytes
        ).reshape(stop - start, *self.shape[1:])


class H5Rows(Rows):
    """Those of a dataset of an HDF5 file, which is opened for every read: nothing is kept but its name."""

    def __init__(self, path: Path, dataset: h5py.Dataset) -> None:
        super().__init__(path, dataset.shape, dataset.dtype)
        self.name = str(dataset.name)

    def read(self, start: int, stop: int) -> np.ndarray:
        with h5py.File(self.path, "r") as file:
            return np.asarray(file[self.name][start:stop])


class ZarrRows(Rows):
    """Those of an array of a zarr group in a folder, which is opened for every read as an HDF5 file is."""

    def __init__(self, path: Path, name: str, array: Any) -> None:
        super().__init__(path, array.shape, array.dtype)
        self.name = name

    def read(self, start: int, stop: int) -> np.ndarray:
        group = importlib.import_module("zarr").open_group(self.path, mode="r")
        return np.asarray(group[self.name][start:stop])


class Stored(Tensor):
    """A tensor whose rows stay in a file: indexing and `split` read them, anything else is an error.

    Args:
        rows: of the file. change: rows (k, ...) and their numbers (k,) to the tensor (k, C, H, W) that they are.
        shape, dtype: of the whole tensor. chosen: which rows, in which order; None: all. fields: whether it is targets,
            of which the norms are asked for.
    """

    on_disk = True
    rows: Rows
    change: Callable[[np.ndarray, np.ndarray], Tensor]
    chosen: np.ndarray | None
    fields: bool
    norms: Tensor | None

    @staticmethod
    def __new__(
        cls, rows: Rows, change: Any, shape: Sequence[int], dtype: torch.dtype, chosen: Any = None, fields: bool = False
    ) -> Stored:
        make: Any = Tensor._make_wrapper_subclass
        made: Stored = make(cls, tuple(shape), dtype=dtype)
        made.rows, made.change, made.chosen, made.fields, made.norms = rows, change, chosen, fields, None
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def only(self, index: Int[np.ndarray, " m"]) -> Stored:
        """The tensor of these rows, still in the file."""
        chosen = index if self.chosen is None else self.chosen[index]
        return Stored(self.rows, self.change, (len(index), *self.shape[1:]), self.dtype, chosen, self.fields)

    @property
    def by_place(self) -> Tensor:
        """The rows in the order of the file."""
        return torch.arange(len(self)) if self.chosen is None else torch.from_numpy(np.argsort(self.chosen))

    def __getitem__(self, which: Any) -> Tensor:
        if isinstance(which, int):
            return self[which : which + 1 or None][0]
        index = np.arange(len(self))[which.numpy() if isinstance(which, Tensor) else which]
        numbers = index if self.chosen is None else self.chosen[index]
        return self.change(self.rows.take(numbers), numbers)

    def split(self, size: Any, dim: int = 0) -> Iterator[Tensor]:  # type: ignore[override]  # never all at once
        """Parts of at most `size` rows, and of CHUNK values, in the order of the file; a pass over fields to the end
        leaves the `norms` of the rows, in their own order."""
        step = max(1, min(size, CHUNK // max(1, math.prod(self.shape[1:]))))
        norms = torch.empty(len(self), dtype=torch.float64)
        for some in self.by_place.split(step):
            part = self[some]
            if self.fields:
                norms[some] = norms_of(part)
            yield part
        self.norms = norms if self.fields else None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch's own subclasses do
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ValueError(
            f"{function} takes a whole tensor, and this one stays on disk, read by rows: set data.in_memory=true"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Stored({tuple(self.shape)}, {self.dtype}, {self.rows.path})"

"""Numeric arrays of MATLAB files of version 5 (to 7.2), with every length checked before it is believed.

scipy.io.loadmat reads more of the format, but a damaged file can make it crash the process.

Reference:
    MathWorks, MAT-File Format, chapter 1 (Level 5).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orca_rank.artifacts.damaged import check_size

# Data types (Table 1-1); classes of arrays that hold real numbers (Table 1-3).
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x0800
_HEAD = 4096  # bytes of a compressed array that hold its name and dimensions
_LARGEST_NAME = 63


class _Variable(NamedTuple):
    """An array in a file: its name and shape (None if it has no real numbers) and its element, maybe compressed."""

    name: str
    shape: tuple[int, ...] | None
    element: memoryview
    compressed: bool


def shapes(path: Path) -> dict[str, tuple[int, ...] | None]:
    """Name -> shape of every array in a file, None for those without real numbers; none of them is read.

    Raises:
        ValueError, zlib.error: if the bytes are not those of such a file.
    """
    return {one.name: one.shape for one in _variables(path)[1]}


def read(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays of real numbers, those that are there; each no larger than the limit on sizes.

    Raises:
        DamagedFile: for a declared size beyond the limit. ValueError, zlib.error: for a damaged file.
    """
    order, found = _variables(path)
    arrays = {}
    for one in found:
        if one.name in names and one.shape is not None:
            check_size(path, repr(one.name), one.shape, 8)
            arrays[one.name] = _array(one, order)
    return arrays


def _variables(path: Path) -> tuple[str, list[_Variable]]:
    """The byte order, "<" or ">", and what the file holds."""
    content = np.memmap(path, np.uint8, "r").data
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:128]))
    if order is None or struct.unpack(f"{order}H", content[124:126]) != (0x0100,):
        raise ValueError("no header of version 5")
    found = []
    for kind, data in _elements(content[128:], order):
        if kind not in (_MATRIX, _COMPRESSED):
            raise ValueError(f"an element of type {kind} where an array is expected")
        packed = kind == _COMPRESSED
        head = _unpacked(data, _HEAD, order) if packed else data
        name, shape, _, _ = _described(head, order)
        found.append(_Variable(name, shape, data, packed))
    return order, found


def _array(one: _Variable, order: str) -> np.ndarray:
    count = math.prod(one.shape or ())
    data = _unpacked(one.element, 8 * count + _HEAD, order) if one.compressed else one.element
    _, shape, kind, rest = _described(data, order)
    stored, values, _ = _first(rest, order)
    if stored not in _TYPES or shape is None:
        raise ValueError(f"{one.name!r} holds elements of type {stored}")
    numbers = np.frombuffer(values, np.dtype(order + _TYPES[stored]))
    if len(numbers) != count:
        raise ValueError(f"{one.name!r} has {len(numbers)} numbers for the dimensions {shape}")
    return numbers.reshape(shape, order="F").astype(_CLASSES[kind])


def _described(data: memoryview, order: str) -> tuple[str, tuple[int, ...] | None, int, memoryview]:
    """(name, shape, class, what follows) of an array's element; the shape is None if it has no real numbers."""
    kinds, flags, rest = _first(data, order)
    if kinds != 6 or len(flags) != 8:
        raise ValueError("an array without flags")
    word = struct.unpack(f"{order}I", flags[:4])[0]
    kind, lengths, rest = _first(rest, order)
    if kind != 5 or not 8 <= len(lengths) <= 128 or len(lengths) % 4:
        raise ValueError("an array without dimensions")
    shape = struct.unpack(f"{order}{len(lengths) // 4}i", lengths)
    kind, name, rest = _first(rest, order)
    if kind not in (1, 2, 16) or len(name) > _LARGEST_NAME or min(shape) < 0:
        raise ValueError("an array without a name, or with a negative dimension")
    real = (word & 0xFF) in _CLASSES and not word & _COMPLEX
    return bytes(name).decode("utf-8", "replace"), shape if real else None, word & 0xFF, rest


def _unpacked(data: memoryview, most: int, order: str) -> memoryview:
    """The data of the array's element in a compressed one, of which no more than `most` bytes are unpacked.

    zlib's own checksum is looked at where the end is among them.
    """
    unpack = zlib.decompressobj()
    content = unpack.decompress(data, most)
    if len(content) < 8 or struct.unpack(f"{order}I", content[:4]) != (_MATRIX,):
        raise ValueError("a compressed array that is cut off, or none")
    length = struct.unpack(f"{order}I", content[4:8])[0]
    if length > len(content) - 8 and len(content) < most:
        raise ValueError(f"a compressed array of {length} bytes where {len(content) - 8} are left")
    return memoryview(content)[8:]


def _first(data: memoryview, order: str) -> tuple[int, memoryview, memoryview]:
    """(type, data, what follows) of the first element."""
    if len(data) < 8:
        raise ValueError("an element that is cut off")
    word = struct.unpack(f"{order}I", data[:4])[0]
    if small := word >> 16:  # type and length share the first four bytes, the data are in the other four
        if small > 4:
            raise ValueError(f"a small element of {small} bytes")
        return word & 0xFFFF, data[4 : 4 + small], data[8:]
    length = struct.unpack(f"{order}I", data[4:8])[0]
    if length > len(data) - 8:
        raise ValueError(f"an element of {length} bytes where {len(data) - 8} are left")
    return word, data[8 : 8 + length], data[8 + length + -length % 8 :]


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, data) of one element after the other at the file's top level, where compressed ones are not padded."""
    while len(data):
        kind, value, rest = _first(data, order)
        yield kind, value
        data = data[8 + len(value) :] if kind == _COMPRESSED else rest

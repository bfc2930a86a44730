"""Inputs and fields as files hold them, to (n, C, H, W): order of axes, fill values, and precision worth keeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from orca_rank.data.stored import Rows, Stored
from orca_rank.normaliser import Normaliser, axes_of, chunk_of

LAYOUTS = ("first", "last", "none", None)
# Rounding to float32 may move a value by so much of its pixel's or channel's deviation; more, and float64 is kept.
_ROUNDING = 1e-5
# A value is taken for a fill value where it repeats exactly, or is a number that programs are known to fill with, and
# lies so many ranges of all others away from them …
_FAR = 5.0
# … or so many, if it both repeats and is known.
_FAR_CODE = 0.5
_LARGE = (9.969209968386869e36, float(np.finfo(np.float32).max))  # netCDF's own, and the largest there is
_CODES = {9999.0, 99999.0, 999.0, 999999.0, 32767.0, 32768.0, 65535.0, 2147483647.0, 2147483648.0}


def arranged(x: np.ndarray, channels: str | None, name: str, option: str, grid: tuple[int, int] | None) -> np.ndarray:
    """(n, H, W), (n, C, H, W) or (n, H, W, C) as (n, C, H, W), a view.

    Args:
        channels: "first", "last" or "none" says where the axis of channels is; None: as the shape says.
        name, option: of the array and of the option `channels`, for messages.
        grid: (H, W) of the inputs that a field belongs to, by which its axes are told where `channels` is None.

    Raises:
        ValueError: for another number of axes, or a shape that does not say where its channels are.
    """
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise ValueError(f"{name} have shape {x.shape}: expected (n, H, W), (n, C, H, W) or (n, H, W, C)")
    if x.ndim == 3:
        return x[:, None]
    if channels == "none":
        raise ValueError(f"{name} have shape {x.shape}, with {option}=none expected (n, H, W): set it to first or last")
    shapes = {"first": x.shape[1:], "last": (x.shape[3], *x.shape[1:3])}
    if channels is None:
        fits = [order for order, shape in shapes.items() if shape[1:] == grid]
        if len(fits) == 1:
            channels = fits[0]
        elif _plausible(shapes["first"]):
            channels = "first"
        else:
            first, last = ("{} channels of {}×{}".format(*shape) for shape in shapes.values())
            raise ValueError(
                f"{name} have shape {x.shape}, which would be {first} with channels='first' and {last} with "
                f"channels='last': say which with {option}=first or {option}=last"
            )
    return x if channels == "first" else x.transpose(0, 3, 1, 2)


def arranged_series(
    x: np.ndarray, channels: str | None, name: str, option: str, grid: tuple[int, int] | None
) -> np.ndarray:
    """(n, L), (n, C, L) or (n, L, C) as (n, C, 1, L), a view; arguments and errors as in `arranged`, grid (1, L)."""
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise ValueError(f"{name} have shape {x.shape}: expected series (n, L), (n, C, L) or (n, L, C)")
    if x.ndim == 2:
        return x[:, None, None]
    if channels is None:
        length = None if grid is None else grid[1]
        if length in x.shape[1:] and x.shape[1] != x.shape[2]:
            channels = "first" if x.shape[2] == length else "last"
        elif x.shape[1] <= x.shape[2]:
            channels = "first"
        else:
            raise ValueError(
                f"{name} have shape {x.shape}: say with {option}=first or {option}=last which of the two numbers "
                f"counts the channels of a series"
            )
    if channels == "none":
        raise ValueError(f"{name} have shape {x.shape}, with {option}=none expected (n, L): set it to first or last")
    return (x if channels == "first" else x.transpose(0, 2, 1))[:, :, None]


def _plausible(shape: tuple[int, ...]) -> bool:
    return shape[0] <= max(4, min(shape[1:]))


def kept(x: np.ndarray, fill: Sequence[float] | None, name: str, option: str, per: str) -> Tensor:
    """An array (n, C, H, W) as the tensor that is held in memory, fill values as NaN.

    bool and uint8 stay bytes; other numbers become float32, or float64 where rounding would cost the statistics of a
    pixel or channel more than five digits.

    Args:
        fill: values that mark missing ones, NaN among them; None: there are none, whatever the values look like.
        name, option: of the array and of the option `fill`, for messages. per: "pixel" or "channel".

    Raises:
        ValueError: for another dtype; values that are not finite, or look like fill values, and are not in `fill`.
    """
    x = _plain(x, fill, name, option)
    if x.dtype != np.uint8 and fill is not None:
        _check_fill(x, name, option)
    return _rounded(x, per)


def kept_or_stored(
    x: np.ndarray | Rows,
    arrange: Callable[[np.ndarray], np.ndarray],
    fill: Sequence[float] | None,
    name: str,
    option: str,
    per: str,
    *,
    fields: bool = False,
) -> Tensor:
    """`kept` of the arranged array, or the `Stored` one whose rows become what `kept` makes of them.

    A sample of the rows says what the others are held as and whether there are fill values; float64 stays float64
    there where the sample asks for it. All rows are looked at for NaN and infinity as they are read.
    """
    if isinstance(x, np.ndarray):
        return kept(arrange(x), fill, name, option, per)
    like = kept(arrange(x.sample), fill, name, option, per)
    dtype = torch.float32 if fill and like.dtype == torch.uint8 else like.dtype
    numbers = {torch.uint8: np.uint8, torch.float32: np.float32, torch.float64: np.float64}[dtype]

    def change(rows: np.ndarray, which: np.ndarray) -> Tensor:
        return torch.from_numpy(_plain(arrange(rows), fill, name, option, which).astype(numbers, copy=False))

    return Stored(x, change, (len(x), *like.shape[1:]), dtype, fields=fields)


def _plain(
    x: np.ndarray, fill: Sequence[float] | None, name: str, option: str, numbers: np.ndarray | None = None
) -> np.ndarray:
    """Numbers that torch knows, bool as uint8, fill values as NaN, no other NaN; numbers: of the samples."""
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{name} have dtype {x.dtype}: expected bool, integer or float")
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8 and max(abs(int(x.min())), abs(int(x.max()))) > 2**53:
        raise ValueError(f"{name} are integers beyond 2^53, which floats cannot tell apart: subtract an offset first")
    x = x.view(np.uint8) if x.dtype == np.bool_ else x
    x = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    if x.dtype.kind == "f" and x.dtype.itemsize > 8:
        x = x.astype(np.float64)
    filled = _is_fill(x, fill or ())
    if filled is not None and filled.any():
        x = x.astype(np.float32 if x.dtype in (np.uint8, np.int8, np.int16, np.uint16, np.float16) else x.dtype)
        x = x.astype(np.float64) if x.dtype.kind != "f" else x
        x = np.where(filled, np.array(np.nan, x.dtype), x)
    _check_finite(x, fill, name, option, numbers)
    return x


def _is_fill(x: np.ndarray, fill: Sequence[float]) -> np.ndarray | None:
    """Where x holds one of the fill values, at the precision of x."""
    found = None
    for value in fill:
        if np.isnan(value):
            here = np.isnan(x) if x.dtype.kind == "f" else np.zeros(x.shape, np.bool_)
        else:
            with np.errstate(over="ignore"):
                here = x == (np.asarray(value).astype(x.dtype) if x.dtype.kind == "f" else value)
        found = here if found is None else found | here
    return found


def _check_finite(
    values: np.ndarray, fill: Sequence[float] | None, name: str, option: str, numbers: np.ndarray | None
) -> None:
    if values.dtype.kind != "f":
        return
    flat = values.reshape(len(values), -1)
    name_of = np.arange(len(flat)) if numbers is None else numbers
    bad = np.flatnonzero((np.isinf(flat) if fill else ~np.isfinite(flat)).any(axis=1))
    if len(bad):
        also = "" if fill is None else f", or set {option}=nan where NaN marks missing values"
        raise ValueError(
            f"{name} have NaN or infinite values in {len(bad)} sample(s), the first is number {name_of[bad[0]]}: leave "
            f"these out{also}"
        )
    empty = np.flatnonzero(np.isnan(flat).all(axis=1)) if fill else bad
    if len(empty):
        first = name_of[empty[0]]
        raise ValueError(f"{name} have {len(empty)} sample(s) without any value, the first is number {first}")


def _check_fill(x: np.ndarray, name: str, option: str) -> None:
    """Raise ValueError for what looks like a fill value: see _FAR."""
    for channel in range(x.shape[1]):
        values = x[:, channel]
        if values.dtype.kind == "f" and np.isnan(values).all():
            continue
        for end, value in (("smallest", np.nanmin(values)), ("largest", np.nanmax(values))):
            same = values == value
            count, size = int(same.sum()), abs(float(value))
            code = size in _CODES or size >= 1e15
            if count < 3 and not _known(size):
                continue
            rest = values[~same & ~np.isnan(values)] if values.dtype.kind == "f" else values[~same]
            if len(rest) < 10:
                continue
            low, high = float(rest.min()), float(rest.max())
            away = max(low - float(value), float(value) - high)
            if (
                away <= (_FAR_CODE if code and count >= 3 else _FAR) * (high - low)
                or len(np.unique(rest[:: 1 + len(rest) // 4096])) < 10
            ):
                continue
            raise ValueError(
                f"{name} hold {value:g} exactly {count} times as their {end} value{_of(channel, x)}, while all others "
                f"lie from {low:g} to {high:g}: it looks like a fill value for missing data. Set {option}={value:g} to "
                f"leave it out, or {option}=none if it is a value like the others"
            )


def _known(size: float) -> bool:
    """Whether programs are known to fill with a number, rather than with any of its size: 9999, 1e20, netCDF's own."""
    likely = [*_LARGE, float(f"{size:.0e}")] if size >= 1e15 else [*_CODES]
    return any(abs(size - value) <= 1e-6 * value for value in likely)


def _of(channel: int, x: np.ndarray) -> str:
    return f" in channel {channel}" if x.shape[1] > 1 else ""


def _rounded(x: np.ndarray, per: str) -> Tensor:
    """float32 where that is as good as float64 for the statistics that are wanted."""
    if x.dtype == np.uint8 or x.dtype == np.float32:
        return torch.from_numpy(x)
    if x.dtype in (np.int8, np.int16, np.uint16, np.float16):
        return torch.from_numpy(x.astype(np.float32))
    exact = torch.from_numpy(x.astype(np.float64))
    std = Normaliser.fit(exact, "pixel" if per == "pixel" else "channel").std
    single = exact.float()
    for wide, narrow in zip(exact.split(chunk_of(exact)), single.split(chunk_of(exact)), strict=True):
        off = (narrow.double() - wide).abs().nan_to_num(0.0, posinf=torch.inf)
        if (off.amax(axes_of("pixel", off.ndim)) > _ROUNDING * std).logical_and(std > 0).any():
            return exact
    return single

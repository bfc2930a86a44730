"""Affine scaling of what data hold to what a network sees, at the precision that the data have.

Everything here is equivariant: data x and a·x + b, a > 0, are normalised to the same numbers, for as long as the file's
own precision tells a·x + b apart. No constant of this file is added to or compared with a value of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Shaped
from torch import Tensor

PER = ("pixel", "channel")
_CHUNK = 2**21  # values in float64 at a time: a few arrays of 16 MiB
_LARGE_OFFSET = 100.0  # means of so many deviations leave float32 five digits for the variation
_FLOAT32 = (1e-30, 1e30)  # magnitudes that float32 holds with all its digits, and room to spare for test data


@dataclass(frozen=True, eq=False)
class Normaliser:
    """encode(x) = (x − mean) / std and decode(z) = z std + mean, per pixel or per channel.

    The unit-Gaussian normaliser of FNO and ORCA, without its absolute ε: std is 0 where training data never vary, and
    there encode gives 0 whatever comes, and decode gives the mean.

    Args:
        mean, std: finite, broadcastable to a sample (c, H, W), e.g. (c, 1, 1), or to a vector (k,); std >= 0.

    Raises:
        ValueError: for a mean or std that is not finite, or a negative std.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std >= 0).all()):
            raise ValueError("a normaliser needs a finite mean and a finite standard deviation that is not negative")

    @classmethod
    def fit(cls, x: Shaped[Tensor, "n c ..."], per: str = "pixel") -> Normaliser:
        """Mean and standard deviation over the samples of x, in float64, missing values (NaN) aside. Of a tensor that
        stays on disk all rows are read once, and the first ones say what values are scaled by in between.

        Args:
            per: "pixel": one of each per pixel, with n − 1 in the denominator as in FNO; "channel": per channel.

        Raises:
            ValueError: for another `per`, or no samples.
        """
        if per not in PER:
            raise ValueError(f"per must be one of {PER}, received {per!r}")
        if len(x) == 0:
            raise ValueError("statistics need at least one sample, received none")
        once, ends = on_disk(x), None
        low, high = extremes(x[: chunk_of(x)] if once else x, per)
        centre, half = low / 2 + high / 2, high / 2 - low / 2  # halved first: their difference may be infinite
        scale = torch.where(half > 0, half, 1.0)
        axes = axes_of(per, x.ndim)
        count = torch.zeros_like(centre)
        mean, squares = torch.zeros_like(centre), torch.zeros_like(centre)
        for part in x.split(chunk_of(x)):  # Chan, Golub and LeVeque (1979): parts joined without cancellation
            ends = _wider(ends, part, axes) if once else None
            values = (part.double() - centre) / scale  # in [−1, 1], or near it
            valid = ~values.isnan()
            here = valid.sum(axes, keepdim=True)[0].double()
            part_mean = values.nansum(axes, keepdim=True)[0] / here.clamp_min(1)
            part_squares = (values - part_mean).square().nansum(axes, keepdim=True)[0]
            total = (count + here).clamp_min(1)
            step = part_mean - mean
            squares += part_squares + step.square() * count * here / total
            mean += step * here / total
            count += here
        if once:
            low, high = _known(ends)
        freedom = (count - 1 if per == "pixel" else count).clamp_min(1)
        varies = high / 2 - low / 2 > resolution(x.dtype) * torch.maximum(low.abs(), high.abs())
        std = torch.where(varies, (squares / freedom).sqrt() * scale, 0.0)
        return cls(torch.where(varies | once, centre + mean * scale, centre), std)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse samples (C, H, W) that these statistics are not of.

        Raises:
            ValueError: for other channels, or another grid where there is one mean per pixel.
        """
        for value in (self.mean, self.std):
            own = tuple(value.shape)
            if own and (len(own) != len(shape) or any(a not in (1, b) for a, b in zip(own, shape, strict=True))):
                raise ValueError(
                    f"the inputs have shape {shape} (channels, height, width), but the statistics to normalise them by "
                    f"have shape {own}: these are other data than the model was fine-tuned on"
                )

    @cached_property
    def unit(self) -> float:
        """A magnitude to measure values in: the largest deviation, or mean where nothing varies, or 1."""
        return float(self.std.max()) or float(self.mean.abs().max()) or 1.0

    @cached_property
    def precision(self) -> torch.dtype:
        """float32 where it is enough to compute in, else float64."""
        std = self.std[self.std > 0]
        sizes = torch.cat([std.double().flatten(), self.mean[self.mean != 0].double().abs().flatten()])
        if len(sizes) and not _FLOAT32[0] < sizes.min() <= sizes.max() < _FLOAT32[1]:
            return torch.float64
        ratio = torch.where(self.std > 0, self.mean.double().abs() / self.std.double(), 0.0)
        return torch.float64 if ratio.max() > _LARGE_OFFSET else torch.float32

    def like(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, std, x) on the device of x and in a precision that is enough for all of them."""
        dtype = torch.float64 if torch.float64 in (x.dtype, self.precision) else torch.float32
        return self.mean.to(dtype).to(x.device), self.std.to(dtype).to(x.device), x.to(dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Stored values to what the network sees, float32; missing values (NaN) become 0, the mean."""
        mean, std, x = self.like(x)
        encoded = torch.where(std > 0, (x - mean) / torch.where(std > 0, std, 1.0), 0.0)
        return encoded.nan_to_num(0.0, posinf=math.inf, neginf=-math.inf).float()

    def decode(self, x: Tensor) -> Tensor:
        """The network's numbers to stored values; float64 where float32 cannot hold them."""
        mean, std, x = self.like(x)
        return x * std + mean

    def to_dict(self) -> dict[str, Tensor]:
        """Plain tensors for a file."""
        return {"mean": self.mean, "std": self.std}

    @classmethod
    def from_dict(cls, values: Mapping[str, Tensor]) -> Normaliser:
        """What `to_dict` gave.

        Raises:
            ValueError: if mean or std is missing, or as the constructor.
        """
        if missing := {"mean", "std"} - set(values):
            raise ValueError(f"statistics need mean and std; {sorted(missing)} missing, received {sorted(values)}")
        return cls(torch.as_tensor(values["mean"]), torch.as_tensor(values["std"]))


def named(statistics: Mapping[str, Normaliser | None]) -> dict[str, Tensor]:
    """{"inputs": a normaliser} as tensors {"inputs.mean", "inputs.std"}, for a file."""
    known = {name: one.to_dict() for name, one in statistics.items() if one is not None}
    return {f"{name}.{part}": value for name, own in known.items() for part, value in own.items()}


def take_named(tensors: dict[str, Tensor], name: str) -> Normaliser | None:
    """The normaliser of this name, taken out of what `named` gave, or what holds it beside others."""
    if f"{name}.mean" not in tensors:
        return None
    return Normaliser(tensors.pop(f"{name}.mean"), tensors.pop(f"{name}.std"))


def axes_of(per: str, ndim: int) -> tuple[int, ...]:
    """The axes of samples (n, c, ...) that share one mean: all but that of the channels, or that of the samples."""
    return (0,) if per == "pixel" else (0, *range(2, ndim))


def on_disk(x: Tensor) -> bool:
    """Whether a tensor says that its rows stay in a file (`data.stored`): every pass over it reads them."""
    return bool(getattr(x, "on_disk", False))


def by_place(x: Tensor) -> Tensor:
    """The rows of x in the order in which a pass over all reads them best: that of the file, where they are in one."""
    return x.by_place if on_disk(x) else torch.arange(len(x))  # type: ignore[attr-defined]  # of Stored


def chunk_of(x: Tensor) -> int:
    """Samples of x to convert to float64 at a time."""
    return max(1, _CHUNK // max(1, math.prod(x.shape[1:])))


def extremes(x: Shaped[Tensor, "n c ..."], per: str) -> tuple[Tensor, Tensor]:
    """Smallest and largest value per pixel or channel, float64, missing values aside (0 where all are missing)."""
    axes = axes_of(per, x.ndim)
    ends: Ends | None = None
    for part in x.split(chunk_of(x)):
        ends = _wider(ends, part, axes)
    return _known(ends)


Ends = tuple[Tensor, Tensor]


def _wider(ends: Ends | None, part: Tensor, axes: tuple[int, ...]) -> Ends:
    """The smallest and largest values so far, and those of one more part; infinite where all are missing."""
    low, high = part, part
    if part.is_floating_point():
        low, high = part.nan_to_num(math.inf, math.inf, -math.inf), part.nan_to_num(-math.inf, math.inf, -math.inf)
    low, high = low.amin(axes, keepdim=True)[0].double(), high.amax(axes, keepdim=True)[0].double()
    return (low, high) if ends is None else (torch.minimum(ends[0], low), torch.maximum(ends[1], high))


def _known(ends: Ends | None) -> Ends:
    if ends is None:
        raise ValueError("extremes need at least one sample, received none")
    known = ends[0] <= ends[1]
    return torch.where(known, ends[0], 0.0), torch.where(known, ends[1], 0.0)


def resolution(dtype: torch.dtype) -> float:
    """Relative distance of neighbouring numbers; 0 for integers, which are exact."""
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0

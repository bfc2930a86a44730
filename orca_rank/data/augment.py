"""Augmentation of image batches as a few whole-batch tensor operations: crop, flip, RandAugment, mixup, CutMix.

Every random number of a batch comes from one NumPy generator. A training loop that seeds it by (seed, epoch, batch)
draws the same augmentation after a resume as without one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

GEOMETRIC = ("rotate", "shear_x", "shear_y")
PHOTOMETRIC = ("brightness", "contrast", "saturation")
OPERATIONS = ("identity", *GEOMETRIC, *PHOTOMETRIC)


@dataclass(frozen=True)
class Augmentation:
    """What to do to training images; the defaults are mild.

    Args:
        crop_scale: smallest and largest area of the random crop, as a fraction of the image's area.
        crop_ratio: largest aspect ratio r of the crop; drawn log-uniformly from [1/r, r].
        flip: mirror left to right with probability ½.
        operations: RandAugment's number of operations per image (Cubuk et al., arXiv 1909.13719); 0: none.
        magnitude: RandAugment's strength from 0 to 10.
        smoothing: label smoothing ε: (1 − ε) one-hot + ε / classes.
        mixup: Beta(α, α) of mixup (arXiv 1710.09412); 0: never. cutmix: the same for CutMix (arXiv 1905.04899).
        mix_probability: that a batch is mixed at all; mixup and CutMix are then equally likely if both are on.

    Raises:
        ValueError: for values outside these ranges.
    """

    crop_scale: Sequence[float] = (0.4, 1.0)
    crop_ratio: float = 4 / 3
    flip: bool = True
    operations: int = 0
    magnitude: float = 5.0
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_scale", tuple(float(value) for value in self.crop_scale))
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be 0 < smallest <= largest <= 1, received {self.crop_scale}")
        if self.crop_ratio < 1:
            raise ValueError(f"crop_ratio must be at least 1, received {self.crop_ratio}")
        if not 0 <= self.smoothing < 1 or not 0 <= self.mix_probability <= 1:
            raise ValueError(
                f"smoothing must lie in [0, 1) and mix_probability in [0, 1], received {self.smoothing} and "
                f"{self.mix_probability}"
            )
        if min(self.mixup, self.cutmix, self.operations) < 0 or not 0 <= self.magnitude <= 10:
            raise ValueError("mixup, cutmix and operations must not be negative, and magnitude must lie in [0, 10]")

    def images(self, x: Float[Tensor, "b c h w"], random: np.random.Generator) -> Float[Tensor, "b c h w"]:
        """Crop, flip and RandAugment; x in [0, 1]."""
        draws = draw_operations(len(x), self.operations, self.magnitude, random)
        matrix = crop_matrix(len(x), self.crop_scale, self.crop_ratio, self.flip, random)
        matrix = with_shape_operations(matrix, draws)
        grid = F.affine_grid(matrix.to(x), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return colour(x, draws) if self.operations else x


def draw_operations(
    count: int, operations: int, magnitude: float, random: np.random.Generator
) -> dict[str, Float[np.ndarray, " b"]]:
    """RandAugment's draws: for every operation its signed strength in each image, 0 where it was not drawn.

    Full strength (magnitude 10) is a rotation by 30°, a shear by 0.3 and a change of colour by a factor 1 ± 0.9; an
    operation drawn twice counts once.
    """
    full = {"rotate": math.pi / 6, "shear_x": 0.3, "shear_y": 0.3} | dict.fromkeys(PHOTOMETRIC, 0.9)
    chosen = random.integers(len(OPERATIONS), size=(operations, count))
    signs = random.choice([-1.0, 1.0], size=(len(OPERATIONS), count))
    return {
        name: signs[index] * (chosen == index).any(0) * (magnitude / 10 * full[name])
        for index, name in enumerate(OPERATIONS)
        if name != "identity"
    }


def crop_matrix(
    count: int, scale: Sequence[float], ratio: float, flip: bool, random: np.random.Generator
) -> Float[Tensor, "b 2 3"]:
    """Affine maps from the output's coordinates in [−1, 1]² to a random crop inside the input's [−1, 1]²."""
    area = random.uniform(scale[0], scale[1], size=count)
    aspect = np.exp(random.uniform(-math.log(ratio), math.log(ratio), size=count))
    width, height = np.minimum(np.sqrt(area * aspect), 1), np.minimum(np.sqrt(area / aspect), 1)
    x = random.uniform(-1, 1, size=count) * (1 - width)
    y = random.uniform(-1, 1, size=count) * (1 - height)
    mirror = random.choice([-1.0, 1.0], size=count) if flip else np.ones(count)
    matrix = np.zeros((count, 2, 3), dtype=np.float32)
    matrix[:, 0, 0], matrix[:, 0, 2] = width * mirror, x
    matrix[:, 1, 1], matrix[:, 1, 2] = height, y
    return torch.from_numpy(matrix)


def with_shape_operations(
    crop: Float[Tensor, "b 2 3"], draws: dict[str, Float[np.ndarray, " b"]]
) -> Float[Tensor, "b 2 3"]:
    """The crop's linear part followed by RandAugment's rotation and shears about the crop's centre."""
    angle = torch.from_numpy(draws["rotate"]).float()
    shear = torch.eye(2).repeat(len(crop), 1, 1)
    shear[:, 0, 1], shear[:, 1, 0] = torch.from_numpy(draws["shear_x"]), torch.from_numpy(draws["shear_y"])
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).unflatten(1, (2, 2))
    return torch.cat([crop[:, :, :2] @ rotation @ shear, crop[:, :, 2:]], 2)


def colour(x: Float[Tensor, "b c h w"], draws: dict[str, Float[np.ndarray, " b"]]) -> Float[Tensor, "b c h w"]:
    """Brightness, contrast and saturation by the drawn factors 1 + strength; the result stays in [0, 1]."""
    factors = {name: 1 + torch.from_numpy(draws[name]).to(x)[:, None, None, None] for name in PHOTOMETRIC}
    x = x * factors["brightness"]
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * factors["contrast"]
    if x.shape[1] == 3:
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * factors["saturation"]
    return x.clamp(0, 1)


def soft_labels(y: Int[Tensor, " b"], classes: int, smoothing: float) -> Float[Tensor, "b classes"]:
    """(1 − ε) one-hot(y) + ε / classes."""
    return F.one_hot(y, classes).float() * (1 - smoothing) + smoothing / classes


def mix(
    x: Float[Tensor, "b c h w"],
    y: Float[Tensor, "b classes"],
    options: Augmentation,
    random: np.random.Generator,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
    """Mixup or CutMix of the batch with a permutation of itself, with one λ ~ Beta(α, α) per batch.

    mixup: λ x + (1 − λ) x′. CutMix: a rectangle of about (1 − λ) of the area is taken from x′, and λ is then the exact
    share of the area that x keeps. Labels are λ y + (1 − λ) y′ in both.
    """
    kinds = [name for name in ("mixup", "cutmix") if getattr(options, name) > 0]
    if not kinds or random.random() >= options.mix_probability:
        return x, y
    kind = kinds[random.integers(len(kinds))]
    share = float(random.beta(getattr(options, kind), getattr(options, kind)))
    other = torch.from_numpy(random.permutation(len(x))).to(x.device)
    if kind == "mixup":
        x = x.lerp(x[other], 1 - share)
    else:
        top, bottom, left, right = rectangle(x.shape[-2:], 1 - share, random)
        x = x.clone()
        x[:, :, top:bottom, left:right] = x[other, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (x.shape[-2] * x.shape[-1])
    return x, y.lerp(y[other], 1 - share)


def rectangle(size: Sequence[int], area: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) with sides √area of the image's, centred uniformly and clipped to the image."""
    edges: list[int] = []
    for length in size:
        half = math.sqrt(area) * length / 2
        centre = random.uniform(0, length)
        edges += [max(0, round(centre - half)), min(length, round(centre + half))]
    return edges[0], edges[1], edges[2], edges[3]

"""A predictor that reads every stage, as a feature pyramid does (Lin et al., arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.predictors import Stages

DEPTHS = 4  # blocks of a columnar ViT that are read


def multiscale(stages: Stages, output_shape: tuple[int, ...], width: int = 48) -> nn.Module:
    """For classes, labels and vectors `StageMeans`, for fields and segmentations `Pyramid`; of a columnar ViT they read
    four depths, evenly spread."""
    if len(output_shape) == 1:
        return StageMeans(stages, output_shape)
    return Pyramid(stages, output_shape, width)


def spread(stages: Stages) -> tuple[int, ...]:
    """Which stages to read: all of a hierarchy, `DEPTHS` evenly spread ones of a column, the last among them."""
    count = len(stages.widths)
    if len(set(stages.reductions)) > 1 or count <= DEPTHS:
        return tuple(range(count))
    return tuple(round((i + 1) * count / DEPTHS) - 1 for i in range(DEPTHS))


class StageMeans(nn.Module):
    """y = W [mean_j LN_1(x_1j), …, mean_j LN_S(x_Sj)] + b: the token means of every stage, normalised, side by side.

    Args:
        stages: of the body. output_shape: (classes,).
    """

    def __init__(self, stages: Stages, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.reads = spread(stages)
        self.fc = nn.Linear(sum(stages.widths[i] for i in self.reads), output_shape[0])

    def forward(self, maps: Sequence[Float[Tensor, "b _h _w _d"]]) -> Float[Tensor, "b classes"]:
        return self.fc(torch.cat([normalised(x).mean((1, 2)) for x in maps], 1))  # (B, h, w, d) each -> (B, classes)


class Pyramid(nn.Module):
    """A field from every stage: y_S = P_S LN(x_S), y_i = P_i LN(x_i) + up(y_{i+1}), then from y_1 two 3×3 convolutions
    with GELU and a linear map of every token to its f × f pixels.

    `up` is bilinear between cell centres. The convolutions repeat the border cell, the even continuation of a field
    given at cell centres, so that no value is invented outside. f is the smallest factor whose grid is not coarser than
    the field's; a finer grid is reduced to the field's by bilinear antialiasing, as the embedder resizes images.

    Args:
        stages: of the body. output_shape: (c, H, W) of the field. width: channels of y.
    """

    def __init__(self, stages: Stages, output_shape: tuple[int, ...], width: int = 48) -> None:
        super().__init__()
        channels, *grid = output_shape
        self.reads, self.grid = spread(stages), tuple(grid)
        tokens = [-(-pixels // stages.reductions[0]) for pixels in stages.image]
        self.factor = max(-(-n // k) for n, k in zip(grid, tokens, strict=True))
        self.laterals = nn.ModuleList(nn.Linear(stages.widths[i], width) for i in self.reads)
        self.mix = nn.Sequential(_conv(width, width), nn.GELU(), _conv(width, width), nn.GELU())
        self.unfold = nn.Conv2d(width, channels * self.factor**2, kernel_size=1)

    def forward(self, maps: Sequence[Float[Tensor, "b _h _w _d"]]) -> Float[Tensor, "b c H W"]:
        sides = [
            lateral(normalised(x)).permute(0, 3, 1, 2)  # (B, h, w, d) -> (B, width, h, w)
            for lateral, x in zip(self.laterals, maps, strict=True)
        ]
        y = sides.pop()
        while sides:
            finer = sides.pop()
            y = finer + upsampled(y, finer)
        y = F.pixel_shuffle(self.unfold(self.mix(y)), self.factor)  # (B, c, f h, f w)
        return y if y.shape[2:] == self.grid else F.interpolate(y, self.grid, mode="bilinear", antialias=True)


def normalised(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """LN: every token to mean 0 and variance 1. Its own scale and shift are left to the linear map that follows."""
    return F.layer_norm(x, x.shape[-1:])


def _conv(d_in: int, d_out: int) -> nn.Conv2d:
    return nn.Conv2d(d_in, d_out, kernel_size=3, padding=1, padding_mode="replicate")


def upsampled(y: Float[Tensor, "b d h w"], finer: Float[Tensor, "b d H W"]) -> Float[Tensor, "b d H W"]:
    """y at the places of a finer grid; where an odd grid was padded before it was halved, what lies outside is cut."""
    (h, w), (height, width) = y.shape[2:], finer.shape[2:]
    rows, columns = -(-height // h), -(-width // w)
    if max(rows, columns) > 1:
        y = F.interpolate(y, (rows * h, columns * w), mode="bilinear")
    return y[:, :, :height, :width]

"""ORCA's predictors (arXiv 2302.05738), which read the last stage alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.predictors import Stages
from orca_rank.predictors.linear import TokenMean


def orca(stages: Stages, output_shape: tuple[int, ...]) -> nn.Module:
    """For classes, labels and vectors the token mean and a linear map; for fields and segmentations the decoder."""
    return TokenMean(stages, output_shape) if len(output_shape) == 1 else DenseDecoder(stages, output_shape)


class DenseDecoder(nn.Module):
    """1×1 convolution (d → 3 c s²) → PixelShuffle(s) → mean of each 3 → average pooling to the grid.

    Every token of the last stage is unfolded to its own s × s pixels, so seams between tokens are to be expected.

    Args:
        stages: of the body; s is the last reduction. output_shape: (c, H, W) of the field.
    """

    reads = (-1,)

    def __init__(self, stages: Stages, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.channels, height, width = output_shape
        self.grid, self.stride = (height, width), stages.reductions[-1]
        self.decoder = nn.Conv2d(stages.widths[-1], 3 * self.channels * self.stride**2, kernel_size=1)

    def forward(self, maps: Sequence[Float[Tensor, "b h w d"]]) -> Float[Tensor, "b c H W"]:
        x = self.decoder(maps[0].permute(0, 3, 1, 2))  # (B, h, w, d) -> (B, 3 c s², h, w)
        x = F.pixel_shuffle(x, self.stride)  # (B, 3 c, s h, s w)
        x = x.unflatten(1, (self.channels, 3)).mean(2)
        return F.adaptive_avg_pool2d(x, self.grid)

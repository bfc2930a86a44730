"""ORCA's dense decoder (arXiv 2302.05738): the last stage alone, each token unfolded to its pixels."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class DensePredictor(nn.Module):
    """ORCA's dense decoder: 1×1 convolution (d → 3 c s²) → PixelShuffle(s) → mean of each 3 → pooling to the grid.

    Args:
        width: features d. stride: image pixels per token of the last stage, s. output_shape: (c, H, W) of the field.
        prefix: tokens of a ViT that stand for no place.
    """

    def __init__(self, width: int, stride: int, output_shape: tuple[int, ...], prefix: int = 0) -> None:
        super().__init__()
        self.channels, *self.grid = output_shape
        self.stride, self.prefix = stride, prefix
        self.decoder = nn.Conv2d(width, 3 * self.channels * stride**2, kernel_size=1)

    def forward(self, features: Float[Tensor, "b ... d"]) -> Float[Tensor, "b c H W"]:
        if features.ndim == 3:  # (B, N, d) -> (B, h, w, d) of a square image
            side = round((features.shape[1] - self.prefix) ** 0.5)
            features = features[:, self.prefix :].unflatten(1, (side, side))
        x = self.decoder(features.permute(0, 3, 1, 2))  # (B, h, w, d) -> (B, 3 c s², h, w)
        x = F.pixel_shuffle(x, self.stride)  # (B, 3 c, s h, s w)
        x = x.unflatten(1, (self.channels, 3)).mean(2)
        return F.adaptive_avg_pool2d(x, self.grid)

"""Series as pictures for a body that reads pictures, and its fields back as series.

Every token of the body's grid stands for one stretch of the series, in the order of reading, left to right and top to
bottom; within a token the samples fill its patch in the same order. A series longer than the picture has pixels goes to
several channels, sample by sample; a shorter one is stretched. (ORCA, arXiv 2302.05738, cuts its one-dimensional inputs
into such stretches too, for a text transformer.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.predictors import Stages


def layers_of(length: int, image: tuple[int, int]) -> int:
    """How many channels of a picture (H, W) one channel of a series of this length takes."""
    return -(-length // (image[0] * image[1]))


def fold(
    x: Float[Tensor, "b c 1 l"], image: tuple[int, int], grid: tuple[int, int], layers: int
) -> Float[Tensor, "b k H W"]:
    """Series (B, C, 1, L) as pictures (B, C · layers, H, W).

    Args:
        image: (H, W). grid: tokens (h, w), whose patches (H / h, W / w) tile the image. layers: see `layers_of`.
    """
    (height, width), (h, w) = image, grid
    if x.shape[-1] != layers * height * width:
        x = F.interpolate(x, (1, layers * height * width), mode="bilinear", antialias=True)
    x = x.unflatten(-1, (h, w, height // h, width // w, layers))[:, :, 0]  # (B, C, h, w, p, q, layers)
    return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(len(x), -1, height, width)


def unfold(y: Float[Tensor, "b k H W"], grid: tuple[int, int], layers: int, length: int) -> Float[Tensor, "b c 1 l"]:
    """Pictures (B, c · layers, H, W) as series (B, c, 1, length): what `fold` undoes."""
    (height, width), (h, w) = y.shape[-2:], grid
    y = y.unflatten(1, (-1, layers)).unflatten(4, (w, width // w)).unflatten(3, (h, height // h))
    y = y.permute(0, 1, 3, 5, 4, 6, 2).flatten(2)[:, :, None]  # (B, c, layers, h, p, w, q) -> (B, c, 1, n)
    return y if y.shape[-1] == length else F.interpolate(y, (1, length), mode="bilinear", antialias=True)


class Unfolded(nn.Module):
    """A predictor of pictures whose output is read as series.

    Args:
        predictor: makes one, see `orca_rank.predictors`. stages: of the body. grid: its tokens (h, w). output_shape:
            (c, 1, L).
    """

    def __init__(
        self,
        predictor: Callable[[Stages, tuple[int, ...]], nn.Module],
        stages: Stages,
        grid: tuple[int, int],
        output_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        channels, _, self.length = output_shape
        self.grid, self.layers = grid, layers_of(self.length, stages.image)
        self.inner = predictor(stages, (channels * self.layers, *stages.image))
        reads: Sequence[int] | None = getattr(self.inner, "reads", None)
        if reads is not None:
            self.reads = reads

    def forward(self, maps: Sequence[Float[Tensor, "b _h _w _d"]] | Tensor) -> Float[Tensor, "b c 1 l"]:
        return unfold(self.inner(maps), self.grid, self.layers, self.length)

"""From a target's images or series to the tokens that a body reads."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.predictors.series import fold, layers_of

INITS = ("pretrained", "random")


class Embedder(nn.Module, ABC):
    """Image → resize → tokens; series are folded first, see `orca_rank.predictors.series`.

    Attributes:
        image_size: pixels (H, W) that images are resized to. grid: tokens (h, w). width: features of a token.

    Args:
        shape: (C, H, W) of the target, (C, 1, L) of series.
        init: "pretrained" tiles the pretrained filters over the target's channels; "random" draws anew
            (truncated normal, std 0.02).

    Raises:
        ValueError: for another `init`.
    """

    image_size: tuple[int, int]
    grid: tuple[int, int]
    width: int

    def __init__(self, shape: tuple[int, int, int], image_size: tuple[int, int], init: str) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"embedder.init must be 'pretrained' or 'random', received {init!r}")
        self.image_size, self.channels = image_size, shape[0]
        self.layers = layers_of(shape[2], image_size) if shape[1] == 1 and shape[2] > 1 else 0  # 0: images

    @property
    def pictures(self) -> int:
        """Channels of the picture that the first convolution sees."""
        return self.channels * max(1, self.layers)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        if x.shape[1] != self.channels:
            raise ValueError(
                f"this embedder was made for {self.channels} channels, received inputs of shape {tuple(x.shape)}"
            )
        if self.layers:
            x = fold(x, self.image_size, self.grid, self.layers)
        elif x.shape[-2:] != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bilinear", antialias=True)
        return self.tokens(x)

    @abstractmethod
    def tokens(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b ..."]:
        """Tokens (B, N, d) or (B, h, w, d) of pictures of the body's own size."""


class Patches(Embedder):
    """A convolution with kernel = stride = patch, then normalisation, as in ORCA.

    Args:
        patch_embed: timm's patch embedding, or one like it, whose geometry, and with init="pretrained" whose weights,
            are taken over.
    """

    def __init__(self, patch_embed: Any, shape: tuple[int, int, int], init: str) -> None:
        super().__init__(shape, pair(patch_embed.img_size), init)
        old = patch_embed.proj
        self.grid, self.width = pair(patch_embed.grid_size), int(old.out_channels)
        self.flatten = bool(getattr(patch_embed, "flatten", False))
        self.proj = widened(old, self.pictures, init)
        self.norm = copy.deepcopy(patch_embed.norm)
        if init == "random" and isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()

    def tokens(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b ..."]:
        x = self.proj(x).permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H/p, W/p, d)
        return self.norm(x.flatten(1, 2) if self.flatten else x)  # ViT: (B, N, d); Swin: (B, H/p, W/p, d)


class Stem(Embedder):
    """Any other first part of a network, its first convolution made for the target's channels.

    Batch normalisation keeps its statistics, in training too.

    Args:
        stem: of the network; it is copied. channels_first: whether it returns (B, d, h, w) rather than (B, h, w, d).
        image_size: (H, W).
    """

    def __init__(
        self,
        stem: nn.Module,
        channels_first: bool,
        image_size: tuple[int, int],
        shape: tuple[int, int, int],
        init: str,
    ) -> None:
        super().__init__(shape, image_size, init)
        self.stem, self.channels_first = copy.deepcopy(stem), channels_first
        name, first = next((n, m) for n, m in self.stem.named_modules() if isinstance(m, nn.Conv2d))
        if name:
            self.stem.set_submodule(name, widened(first, self.pictures, init))
        else:
            self.stem = widened(first, self.pictures, init)
        self.train()
        with torch.no_grad():
            place = next(self.stem.parameters())
            made = self.tokens(place.new_zeros(1, self.pictures, *image_size))
        self.grid, self.width = (int(made.shape[1]), int(made.shape[2])), int(made.shape[3])

    def tokens(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b h w d"]:
        x = self.stem(x)
        return x.permute(0, 2, 3, 1) if self.channels_first else x

    def train(self, mode: bool = True) -> Stem:
        super().train(mode)
        settle(self)
        return self


def settle(module: nn.Module) -> None:
    """Batch normalisation by the statistics that it has: those of a frozen network are not to move, and what moves
    without a gradient would not be among what is kept of a training."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def widened(old: nn.Conv2d, channels: int, init: str) -> nn.Conv2d:
    """A convolution like `old` for another number of channels; init: see `Embedder`."""
    new = copy.deepcopy(old)  # some pad in a forward pass of their own
    new.in_channels = channels
    new.weight = nn.Parameter(old.weight.new_empty(old.out_channels, channels, *old.weight.shape[2:]))
    new.requires_grad_(True).reset_parameters()
    with torch.no_grad():
        if init == "pretrained":
            copies = -(-channels // old.in_channels)
            new.weight.copy_(old.weight.repeat(1, copies, 1, 1)[:, :channels])
            if new.bias is not None and old.bias is not None:
                new.bias.copy_(old.bias)
        else:
            nn.init.trunc_normal_(new.weight, std=0.02)
            if new.bias is not None:
                nn.init.zeros_(new.bias)
    return new


def pair(sizes: object) -> tuple[int, int]:
    """(height, width) of what timm gives for a size."""
    height, width = (sizes, sizes) if isinstance(sizes, int) else tuple(sizes)  # type: ignore[arg-type]
    return int(height), int(width)

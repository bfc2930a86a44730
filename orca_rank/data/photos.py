"""Crops of scikit-learn's two photographs: bundled, so they need no download."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

from orca_rank.data.module import InMemory, Pair, Parts, check_whole
from orca_rank.task import Task


class Photos(InMemory):
    """Square crops of a temple and of a flower, 3 channels in [0, 1], 2 classes: a target near photographs.

    Training and validation crops overlap; test crops come from the right quarter of each photograph, the others from
    the rest. There is little to learn here and much to compare with.

    Args:
        size: pixels a side of a crop. smallest: pixels of the photographs (427 × 640) a crop takes at least.
        train, val, test: crops.
        batch_size, seed: see `InMemory`; the seed also draws the crops.

    Raises:
        ValueError: for sizes that no crop has.
    """

    def __init__(
        self,
        *,
        size: int = 64,
        smallest: int = 64,
        train: int = 256,
        val: int = 64,
        test: int = 64,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        for name, value in (("size", size), ("smallest", smallest), ("train", train), ("val", val), ("test", test)):
            check_whole(f"photos need whole numbers: {name}", value, least=0)
        if size < 1 or not 1 <= smallest <= 160:
            raise ValueError(f"photos need size >= 1 and smallest from 1 to 160, received {size} and {smallest}")
        if min(train, val, test) < 2:
            raise ValueError(f"photos need at least 2 crops in every part, received {train}, {val} and {test}")
        self.size, self.smallest, self.counts = size, smallest, (train, val, test)

    def load(self) -> Parts:
        photos = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
        random = np.random.default_rng(self.seed)
        left = [photo[:, :, :480] for photo in photos]  # (3, 427, 640) -> (3, 427, 480)
        right = [photo[:, :, 480:] for photo in photos]
        train, val, test = (
            self._crops(part, count, random) for part, count in zip((left, left, right), self.counts, strict=True)
        )
        task = Task("classification", (3, self.size, self.size), (2,))
        inputs = self.inputs(train[0], "channel")
        return Parts(task, train, val, test, encode=inputs.encode, inputs=inputs)

    def _crops(self, photos: list[Tensor], count: int, random: np.random.Generator) -> Pair:
        """Squares of any side from `smallest` to the photograph's own, evenly in the logarithm, resized."""
        labels = np.arange(count) % len(photos)
        crops = []
        for label in labels:
            height, width = photos[label].shape[1:]
            side = round(np.exp(random.uniform(np.log(self.smallest), np.log(min(height, width)))))
            top, start = random.integers(height - side + 1), random.integers(width - side + 1)
            crop = photos[label][None, :, top : top + side, start : start + side]
            crops.append(F.interpolate(crop, (self.size, self.size), mode="bilinear", antialias=True))
        return torch.cat(crops).clamp(0, 1), torch.from_numpy(labels.astype(np.int64))

"""CIFAR-100 from the official files, read in place.

Reference:
    Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from orca_rank.data.module import Affine, InMemory, Parts, limited, stratified_order, take_validation
from orca_rank.task import Task

OFFICIAL_MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def read_official(folder: Path, part: str) -> tuple[UInt8[np.ndarray, "n 3 32 32"], np.ndarray]:
    """Images and fine labels of "train" or "test". A pickle can run code, so only the official bytes are unpickled.

    Raises:
        FileNotFoundError: if the file is missing. ValueError: if its md5 is not the official one.
    """
    path = folder / part
    if not path.is_file():
        raise FileNotFoundError(
            f"CIFAR-100 is missing: {path} does not exist. Unpack the official cifar-100-python.tar.gz so that the "
            f"files train and test lie in <paths.data>/cifar-100-python/, or set paths.data (or ORCA_RANK_DATA) to "
            f"the folder that holds cifar-100-python/"
        )
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != OFFICIAL_MD5[part]:
        raise ValueError(
            f"{path} is not the official CIFAR-100 file: md5 {found}, expected {OFFICIAL_MD5[part]}; it was not "
            f"opened. Unpack cifar-100-python.tar.gz again"
        )
    batch = pickle.loads(content, encoding="latin1")
    return batch["data"].reshape(-1, 3, 32, 32), np.asarray(batch["fine_labels"], dtype=np.int64)


def crop_and_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Every image of x (B, C, H, W) shifted by up to `padding` pixels over black and mirrored with probability ½."""
    count, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)  # (B, H)
    columns = left[:, None] + torch.where(mirrored[:, None], torch.arange(width - 1, -1, -1), torch.arange(width))
    image = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Cifar100(InMemory):
    """CIFAR-100 as target: 100 fine classes, 32×32, per-channel normalisation, random crop and flip in training.

    Args:
        root: the data folder; files are read from <root>/cifar-100-python/.
        augment: crop and flip the training images.
        val_fraction: of the official training images, held out class by class; the official test set is only tested.
        train_limit: images for train and val together; null for all 50,000. test_limit: of the 10,000.
        split_seed: of the validation split and of the limits.
        batch_size, seed: see `InMemory`.

    Raises:
        FileNotFoundError, ValueError: from `read_official`; for fractions and limits that leave nothing to train on.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        augment: bool = True,
        val_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        split_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        self.root, self.augment, self.val_fraction, self.split_seed = Path(root), augment, val_fraction, split_seed
        self.train_limit, self.test_limit = train_limit, test_limit

    @property
    def task(self) -> Task:
        """Known without the files."""
        return Task("classification", (3, 32, 32), (100,))

    def load(self) -> Parts:
        folder = self.root / "cifar-100-python"
        images, labels = read_official(folder, "train")
        train, val = take_validation(stratified_order(labels, self.split_seed), self.val_fraction, self.train_limit)
        test_images, test_labels = read_official(folder, "test")
        test = limited(stratified_order(test_labels, self.split_seed), self.test_limit, "test_limit")
        mean, std = (255 * torch.tensor(value)[:, None, None] for value in (MEAN, STD))

        def pair(x: np.ndarray, y: np.ndarray, index: np.ndarray) -> tuple[Tensor, Tensor]:
            return torch.from_numpy(x[index]), torch.from_numpy(y[index])

        return Parts(
            task=self.task,
            train=pair(images, labels, train),
            val=pair(images, labels, val),
            test=pair(test_images, test_labels, test),
            encode=Affine(mean, std),
            augment=crop_and_flip if self.augment else None,
        )

"""CIFAR-100 from the official files, read in place by torchvision.

Reference:
    Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor
from torchvision.datasets import CIFAR100

from orca_rank.artifacts.damaged import DamagedFile, reading
from orca_rank.data.module import InMemory, Parts, check_fraction, check_whole
from orca_rank.data.splits import limited, stratified_order, take_validation
from orca_rank.normaliser import Normaliser
from orca_rank.task import Task

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_MEND = "unpack the official cifar-100-python.tar.gz again"


def read_official(root: Path, part: str) -> tuple[UInt8[np.ndarray, "n 3 32 32"], np.ndarray]:
    """Images and fine labels of "train" or "test". A pickle can run code, so only the official bytes are unpickled:
    torchvision compares the md5 of every file first.

    Raises:
        FileNotFoundError: if a file is missing. DamagedFile: if one is not the official one.
    """
    folder = root / CIFAR100.base_folder
    for name in ("train", "test", "meta"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"CIFAR-100 is missing: {folder / name} does not exist. Unpack the official cifar-100-python.tar.gz so "
                f"that the files train, test and meta lie in <paths.data>/cifar-100-python/, or set paths.data (or "
                f"ORCA_RANK_DATA) to the folder that holds cifar-100-python/"
            )
    try:
        with reading(folder, _MEND):
            data = CIFAR100(root, train=part == "train", download=False)
            images = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))  # torchvision holds (n, 32, 32, 3)
            return images, np.asarray(data.targets, dtype=np.int64)
    except DamagedFile as error:
        raise DamagedFile(
            f"{folder} does not hold the official CIFAR-100 files train, test and meta: the md5 of one is another, and "
            f"it was not opened; {_MEND}"
        ) from error


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
        permuted: a seed of one permutation that the pixels of all images go through, channels together; null for none.
            The information in an image stays the same and its neighbourhoods are gone, so that nothing of what a
            backbone knows of photographs helps; without augmentation, which has no meaning there.
        val_fraction: of the official training images, held out class by class; the official test set is only tested.
        train_limit: images for train and val together; null for all 50,000. test_limit: of the 10,000.
        split_seed: of the validation split and of the limits.
        batch_size, seed: see `InMemory`.

    Raises:
        FileNotFoundError, DamagedFile: from `read_official`. ValueError: for limits that leave nothing to train on, or
            augment with permuted.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        augment: bool = True,
        permuted: int | None = None,
        val_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        split_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        check_fraction("val_fraction", val_fraction)
        check_whole("train_limit", train_limit, optional=True)
        check_whole("test_limit", test_limit, optional=True)
        check_whole("split_seed", split_seed, least=0)
        check_whole("permuted", permuted, least=0, optional=True)
        if augment and permuted is not None:
            raise ValueError("pixels that are permuted have no neighbours to crop and flip: set data.augment=false")
        self.root, self.augment, self.permuted = Path(root), augment, permuted
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.train_limit, self.test_limit = train_limit, test_limit

    @property
    def task(self) -> Task:
        """Known without the files."""
        return Task("classification", (3, 32, 32), (100,))

    def load(self) -> Parts:
        images, labels = read_official(self.root, "train")
        train, val = take_validation(stratified_order(labels, self.split_seed), self.val_fraction, self.train_limit)
        test_images, test_labels = read_official(self.root, "test")
        test = limited(stratified_order(test_labels, self.split_seed), self.test_limit, "test_limit")
        mean, std = (255 * torch.tensor(value)[:, None, None] for value in (MEAN, STD))
        inputs = Normaliser(mean, std)

        def pair(x: np.ndarray, y: np.ndarray, index: np.ndarray) -> tuple[Tensor, Tensor]:
            chosen = torch.from_numpy(x[index])
            return chosen if self.permuted is None else permute(chosen, self.permuted), torch.from_numpy(y[index])

        return Parts(
            task=self.task,
            train=pair(images, labels, train),
            val=pair(images, labels, val),
            test=pair(test_images, test_labels, test),
            encode=inputs.encode,
            augment=crop_and_flip if self.augment else None,
            inputs=inputs,
        )


def permute(x: Tensor, seed: int) -> Tensor:
    """The pixels of all images of x (n, C, H, W) in one order drawn from the seed, the channels of a pixel together."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(x.shape[-2] * x.shape[-1]))
    return x.flatten(2)[:, :, order].unflatten(2, x.shape[-2:])

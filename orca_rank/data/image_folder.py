"""Images in one folder per class, <root>/<train>/<class>/*.jpg, as a source of images in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from orca_rank.artifacts.provenance import key
from orca_rank.data.module import (
    Affine,
    InMemory,
    Parts,
    channel_statistics,
    limited,
    stratified_order,
    take_test,
    take_validation,
)
from orca_rank.task import Task

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"})


class ImageFolder(InMemory):
    """Photos as uint8 (n, 3, size, size); classes are the folders' names in alphabetical order.

    Args:
        root: the data folder. train: a folder of class folders, relative to root. test: another with the same classes;
            null: test_fraction of train is held out.
        size: side in pixels; the shorter side is resized to it and the middle is cut out.
        test_fraction, val_fraction: held out of all, and then of the rest, class by class.
        train_limit: images for train and val together; null for all. test_limit: of the test set.
        split_seed: of the splits and limits. batch_size, seed: see `InMemory`.

    Raises:
        FileNotFoundError: no such folder. ValueError: fewer than two classes, an unreadable image, or other classes
            in test than in train.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str,
        test: str | None = None,
        size: int = 64,
        test_fraction: float = 0.1,
        val_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        split_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, received {size}")
        self.root, self.train, self.test, self.size = Path(root), train, test, size
        self.test_fraction, self.val_fraction, self.split_seed = test_fraction, val_fraction, split_seed
        self.train_limit, self.test_limit = train_limit, test_limit

    @property
    def contents(self) -> str:
        """Names and sizes stand for the images, of which there may be many."""
        folders = [self.root / name for name in (self.train, self.test) if name is not None]
        files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
        return key([(str(file.relative_to(folder)), file.stat().st_size) for folder, file in files])

    def load(self) -> Parts:
        classes, files, labels = _scan(self.root / self.train)
        order = stratified_order(labels, self.split_seed)
        if self.test is None:
            test_index, order = take_test(order, self.test_fraction)
            test_files, test_labels = files, labels
        else:
            test_classes, test_files, test_labels = _scan(self.root / self.test)
            if test_classes != classes:
                different = sorted(set(classes) ^ set(test_classes))[:3]
                raise ValueError(
                    f"{self.root / self.test} has other classes than {self.train}, for example {different}"
                )
            test_index = stratified_order(test_labels, self.split_seed)
        test_index = limited(test_index, self.test_limit, "test_limit")
        train_index, val_index = take_validation(order, self.val_fraction, self.train_limit)
        train = self._read(files, labels, train_index)
        return Parts(
            task=Task("classification", (3, self.size, self.size), (len(classes),)),
            train=train,
            val=self._read(files, labels, val_index),
            test=self._read(test_files, test_labels, test_index),
            encode=Affine(*channel_statistics(train[0])),
        )

    def _read(self, files: list[Path], labels: np.ndarray, index: np.ndarray) -> tuple[Tensor, Tensor]:
        x = np.empty((len(index), self.size, self.size, 3), dtype=np.uint8)
        for place, number in enumerate(index):
            x[place] = read_image(files[number], self.size)
        return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[index])


def read_image(path: Path, size: int) -> np.ndarray:
    """The middle square of an image at size × size, (size, size, 3) uint8."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            scale = size / min(image.size)
            shape = [max(size, round(side * scale)) for side in image.size]
            image = image.resize(shape, Image.Resampling.BICUBIC)
            left, top = ((side - size) // 2 for side in shape)
            return np.asarray(image.crop((left, top, left + size, top + size)))
    except OSError as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def _scan(folder: Path) -> tuple[list[str], list[Path], np.ndarray]:
    """Class names, image files and labels of a folder of class folders."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: set source.train to a folder that holds one folder per class")
    found = {
        place.name: sorted(file for file in place.rglob("*") if file.suffix.lower() in ENDINGS)
        for place in sorted(folder.iterdir())
        if place.is_dir()
    }
    classes = [name for name, files in found.items() if files]
    if len(classes) < 2:
        raise ValueError(f"{folder} must hold at least two folders with images, found {classes}")
    labels = np.repeat(np.arange(len(classes)), [len(found[name]) for name in classes])
    return classes, [file for name in classes for file in found[name]], labels

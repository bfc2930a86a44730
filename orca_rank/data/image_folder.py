"""Images in one folder per class, <root>/<train>/<class>/*.jpg, held in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from orca_rank.artifacts.provenance import contents_hash, key
from orca_rank.data.checks import seen
from orca_rank.data.image_files import ImageFiles, files_of, hidden, read_image, scan
from orca_rank.data.labels import Class
from orca_rank.data.module import Encode, InMemory, Parts, check_fraction, check_whole
from orca_rank.data.splits import covered, limited, stratified_order, take_test, take_validation
from orca_rank.task import Task


class ImageFolder(InMemory):
    """Images as uint8 (n, 3, size, size); classes are the folders' names in alphabetical order.

    Images are turned as their EXIF data say, 16 bits a channel are scaled to 8, transparency is laid on white, and of
    several frames the first is taken. Files and folders that begin with a dot, and what file managers leave, are passed
    over; other files that are no images are named.

    Args:
        root: the data folder. train: a folder of class folders, relative to root. test: another with the same classes;
            null: test_fraction of train is held out.
        size: side in pixels; the shorter side is resized to it and the middle is cut out.
        test_fraction, val_fraction: held out of all, and then of the rest, class by class.
        train_limit: images for train and val together; null for all. test_limit: of the test set.
        split_seed: of the splits and limits. batch_size, seed, statistics, classes: see `InMemory`.

    Raises:
        FileNotFoundError: no such folder. DamagedFile: an unreadable image. ValueError: fewer than two classes, a class
            of fewer than two or three images, a folder without images, or classes in test that train lacks.
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
        statistics: Mapping[str, Tensor] | None = None,
        classes: Sequence[Class] | None = None,
    ) -> None:
        super().__init__(batch_size, seed, statistics, classes)
        check_whole("size", size)
        check_fraction("test_fraction", test_fraction)
        check_fraction("val_fraction", val_fraction)
        check_whole("train_limit", train_limit, optional=True)
        check_whole("test_limit", test_limit, optional=True)
        check_whole("split_seed", split_seed, least=0)
        self.root, self.train, self.test, self.size = Path(root), train, test, size
        if test is not None and (self.root / test).resolve() == (self.root / train).resolve():
            raise ValueError(
                f"data.test={test} is the training folder itself, and its error would be no test error: name another "
                f"folder; null holds some out"
            )
        self.test_fraction, self.val_fraction, self.split_seed = test_fraction, val_fraction, split_seed
        self.train_limit, self.test_limit = train_limit, test_limit

    @property
    def contents(self) -> str:
        """What the images hold; of more than 1 GiB of them, names and sizes stand for that."""
        folders = [self.root / name for name in (self.train, self.test) if name is not None]
        files = [
            (folder, file) for folder in folders for file in files_of(folder) if not hidden(file.relative_to(folder))
        ]
        sizes = [file.stat().st_size for _, file in files]
        names = key([(str(file.relative_to(folder)), size) for (folder, file), size in zip(files, sizes, strict=True)])
        return names if sum(sizes) > 2**30 else key([names, contents_hash([file for _, file in files])])

    def load(self) -> Parts:
        found = scan(self.root / self.train)
        labels = found.labels
        if labels is None:
            raise ValueError(f"{self.root / self.train} must hold at least two folders with images, found none")
        if len(found.classes) < 2:
            raise ValueError(
                f"{self.root / self.train} must hold at least two folders with images, found {found.classes}"
            )
        self._check_counts(found, 3 if self.test is None else 2)
        notes = list(found.notes)
        order = stratified_order(labels, self.split_seed)
        test_order: np.ndarray
        if self.test is None:
            test_order, order = take_test(order, self.test_fraction)
            tested, test_labels = found, labels
        else:
            tested = scan(self.root / self.test)
            if tested.labels is None:
                raise ValueError(f"{self.root / self.test} must hold folders with images as {self.train} does")
            wrong = f"{self.root / self.test} has classes that {self.train} lacks"
            test_labels = _numbered(tested.classes, tested.labels, found.classes, wrong)
            notes += tested.notes
            test_order = stratified_order(test_labels, self.split_seed)
        train, val = take_validation(order, self.val_fraction, self.train_limit)
        if self.test is None:
            train, test_order = covered(train, test_order, labels)
        train, val = covered(train, val, labels)
        test_order = limited(test_order, self.test_limit, "test_limit")
        x = self._read([found.paths[i] for i in train])
        inputs = self.inputs(x, "channel")
        parts = {
            "train": (x, torch.from_numpy(labels[train])),
            "val": (self._read([found.paths[i] for i in val]), torch.from_numpy(labels[val])),
            "test": (self._read([tested.paths[i] for i in test_order]), torch.from_numpy(test_labels[test_order])),
        }
        task = Task("classification", (3, self.size, self.size), (len(found.classes),), classes=tuple(found.classes))
        notes += seen(parts, self.root / (self.test or self.train))
        return Parts(
            task, parts["train"], parts["val"], parts["test"], encode=inputs.encode, inputs=inputs, notes=tuple(notes)
        )

    def everything(self) -> tuple[Tensor, Tensor | None]:
        """All images of the training folder in the order of their names; without targets where it has no classes."""
        found = scan(self.root / self.train)
        labels = found.labels
        if labels is not None and self.given_classes is not None:
            wrong = f"{self.root / self.train} has classes that the model was not fine-tuned for"
            labels = _numbered(found.classes, labels, self.given_classes, wrong)
        return self._read(found.paths), None if labels is None else torch.from_numpy(labels)

    def encoder(self) -> Encode:
        if self.given is None:
            return self.parts.encode
        self.given.check((3, self.size, self.size))
        return self.given.encode

    def files(self) -> list[str]:
        """Names of the images of `everything`, relative to the training folder."""
        folder = self.root / self.train
        return [str(path.relative_to(folder)) for path in scan(self.root / self.train).paths]

    def _read(self, files: list[Path]) -> Tensor:
        x = np.empty((len(files), self.size, self.size, 3), dtype=np.uint8)
        for place, file in enumerate(files):
            x[place] = read_image(file, self.size)
        return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()

    def _check_counts(self, found: ImageFiles, least: int) -> None:
        counts = Counter(() if found.labels is None else found.labels.tolist())
        small = [f"{found.classes[label]} ({count})" for label, count in sorted(counts.items()) if count < least]
        if small:
            raise ValueError(
                f"{self.root / self.train} has classes of fewer than {least} images: {', '.join(small[:8])}; a class "
                f"needs {least}, to be trained on and measured: give more images or remove the folder"
            )


def _numbered(
    names: Sequence[str], labels: Int[np.ndarray, " n"], classes: Sequence[Class], wrong: str
) -> Int[np.ndarray, " n"]:
    """Labels by the place of their class in `classes`, of which some may be missing.

    Raises:
        ValueError: for a class that is none of these, beginning with `wrong`.
    """
    place = {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in names if name not in place]:
        raise ValueError(f"{wrong}: {unknown[:5]}")
    return np.array([place[name] for name in names], dtype=np.int64)[labels]

"""Your own arrays: classification or dense regression from npz, npy, h5 or pt files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from orca_rank.artifacts.provenance import contents_hash
from orca_rank.data.array_files import read_arrays
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
from orca_rank.task import Normaliser, Task

NORMALISE = ("channel", "pixel", "none")
LABELS = ("file", "kmeans", "index")


@dataclass(frozen=True)
class _Samples:
    """x (n, C, H, W) of any real dtype; y int64 (n,) or float32 (n, c, H, W)."""

    x: Tensor
    y: Tensor

    @property
    def dense(self) -> bool:
        return self.y.is_floating_point()

    def take(self, index: np.ndarray) -> _Samples:
        chosen = torch.from_numpy(np.ascontiguousarray(index))
        return _Samples(self.x[chosen], self.y[chosen])

    def order(self, seed: int) -> np.ndarray:
        labels = np.zeros(len(self.y), dtype=np.int64) if self.dense else self.y.numpy()
        return stratified_order(labels, seed)


class Arrays(InMemory):
    """Arrays x and y from files: integer y (n,) is classification, float y (n, H, W) or (n, c, H, W) a field.

    Inputs are (n, H, W), (n, C, H, W), or (n, H, W, C) with channels="last"; bool, integer or float. They are
    standardised by statistics of the training part; so are the outputs of a field, through `task.normaliser`.

    Args:
        root: the data folder.
        train: an npz, h5 or pt file holding both arrays, or a pair [x.npy, y.npy]; relative to root.
        test: the same for a separate test set. Null: test_fraction of the training file is held out; the same file
            again, with test_x and test_y, for npz files that hold both.
        x, y, test_x, test_y: names of the arrays inside the files; those of the test set default to x and y.
        labels: "file" reads y. For images without labels: "kmeans" makes `clusters` pseudo-classes of the pixels
            (pooled to at most 16×16), "index" gives every sample its own class, which has no covariance within.
        clusters: number of pseudo-classes.
        channels: "first" or "last", where x has four axes.
        normalise: "channel" (one mean and deviation a channel), "pixel" (one each per pixel) or "none".
        test_fraction, val_fraction: held out of all, and then of the rest; class by class for classification.
        train_limit: samples for train and val together; null for all. test_limit: of the test set.
        split_seed: of the splits, limits and pseudo-labels.
        batch_size, seed: see `InMemory`.

    Raises:
        FileNotFoundError, KeyError, ValueError: as `read_arrays`; for wrong shapes or dtypes, NaN, too few samples.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str | Sequence[str],
        test: str | Sequence[str] | None = None,
        x: str = "x",
        y: str = "y",
        test_x: str | None = None,
        test_y: str | None = None,
        labels: str = "file",
        clusters: int = 10,
        channels: str = "first",
        normalise: str = "channel",
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        split_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        for name, value, allowed in (
            ("labels", labels, LABELS),
            ("channels", channels, ("first", "last")),
            ("normalise", normalise, NORMALISE),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, received {value!r}")
        if test is not None and labels != "file":
            raise ValueError(f"labels={labels!r} makes labels for one file; leave test=null or use labels='file'")
        self.root, self.train, self.test = Path(root), train, test
        self.x, self.y, self.test_x, self.test_y = x, y, test_x or x, test_y or y
        self.labels, self.clusters, self.channels, self.normalise = labels, clusters, channels, normalise
        self.test_fraction, self.val_fraction, self.split_seed = test_fraction, val_fraction, split_seed
        self.train_limit, self.test_limit = train_limit, test_limit

    @property
    def contents(self) -> str:
        parts = [[part] if isinstance(part, str) else part for part in (self.train, self.test) if part is not None]
        return contents_hash([self.root / name for part in parts for name in part])

    def load(self) -> Parts:
        everything = self._read(self.train, self.x, self.y)
        order = everything.order(self.split_seed)
        if self.test is None:
            test_order, order = take_test(order, self.test_fraction)
            test = everything.take(limited(test_order, self.test_limit, "test_limit"))
        else:
            test = self._read(self.test, self.test_x, self.test_y)
            test = test.take(limited(test.order(self.split_seed), self.test_limit, "test_limit"))
            _check_alike(everything, test)
        train, val = (everything.take(index) for index in take_validation(order, self.val_fraction, self.train_limit))
        shape = tuple(train.x.shape[1:])
        if train.dense:
            normaliser = None if self.normalise == "none" else Normaliser(*self._statistics(train.y))
            task = Task("dense", shape, tuple(train.y.shape[1:]), normaliser)
        else:
            classes = 1 + int(max(everything.y.max(), test.y.max()))
            task = Task("classification", shape, (classes,))
        return Parts(
            task=task,
            train=(train.x, train.y),
            val=(val.x, val.y),
            test=(test.x, test.y),
            encode=Affine(*self._statistics(train.x)),
        )

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalise == "none":
            return torch.zeros(()), torch.ones(())
        if self.normalise == "channel":
            return channel_statistics(values)
        fitted = Normaliser.fit(values.float())
        return fitted.mean, fitted.std

    def _read(self, files: str | Sequence[str], x_name: str, y_name: str) -> _Samples:
        x, y, name = read_arrays(self.root, files, x_name, y_name if self.labels == "file" else None)
        inputs = _inputs(x, self.channels, f"{x_name!r} of {name}")
        if len(inputs) < 4:
            raise ValueError(f"{name} holds {len(inputs)} sample(s): at least 4 are needed to train, validate and test")
        if self.labels == "kmeans":
            return _Samples(inputs, pseudo_labels(inputs, self.clusters, self.split_seed))
        if self.labels == "index":
            return _Samples(inputs, torch.arange(len(inputs)))
        return _Samples(inputs, _targets(y, len(inputs), f"{y_name!r} of {name}"))


def pseudo_labels(x: Tensor, clusters: int, seed: int, side: int = 16) -> Tensor:
    """K-means classes (n,) of the pixels of x (n, C, H, W), average-pooled to at most side × side.

    Raises:
        ValueError: for fewer than 2 clusters or more than samples.
    """
    if not 2 <= clusters <= len(x):
        raise ValueError(f"clusters must lie between 2 and the number of samples {len(x)}, received {clusters}")
    size = tuple(min(side, length) for length in x.shape[-2:])
    pooled = torch.cat([F.adaptive_avg_pool2d(part.float(), size).flatten(1) for part in x.split(1024)])
    fitted = KMeans(clusters, n_init=1, random_state=seed).fit(pooled.numpy())
    return torch.from_numpy(fitted.labels_.astype(np.int64))


def _inputs(x: np.ndarray, channels: str, name: str) -> Tensor:
    """(n, C, H, W), with the dtype of the file where torch has arithmetic for it."""
    if x.dtype.kind not in "biuf":
        raise ValueError(f"inputs {name} have dtype {x.dtype}: expected bool, integer or float")
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise ValueError(f"inputs {name} have shape {x.shape}: expected (n, H, W), (n, C, H, W) or (n, H, W, C)")
    _check_finite(x, f"inputs {name}")
    if x.ndim == 3:
        x = x[:, None]
    elif channels == "last":
        x = x.transpose(0, 3, 1, 2)
    if x.shape[1] > min(x.shape[2:]) and x.shape[1] > 4:
        raise ValueError(
            f"inputs {name} would be {x.shape[1]} channels of {x.shape[2]}×{x.shape[3]}: "
            f"is channels={channels!r} right?"
        )
    return torch.from_numpy(np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32)))


def _targets(y: np.ndarray, count: int, name: str) -> Tensor:
    if len(y.shape) == 0 or len(y) != count:
        raise ValueError(f"targets {name} have shape {y.shape}: expected {count} of them, one for every input")
    if y.dtype.kind in "iu" and y.ndim == 1:
        if y.min() < 0:
            raise ValueError(f"class labels {name} must be 0, 1, …; the smallest is {y.min()}")
        if y.max() == y.min():
            raise ValueError(f"class labels {name} are all {y.min()}: expected at least 2 classes")
        return torch.from_numpy(y.astype(np.int64))
    if y.dtype.kind in "bf" and y.ndim in (3, 4):
        _check_finite(y, f"targets {name}")
        return torch.from_numpy(np.ascontiguousarray(y[:, None] if y.ndim == 3 else y, dtype=np.float32))
    raise ValueError(
        f"targets {name} have shape {y.shape} and dtype {y.dtype}: expected integer labels (n,) for classification, "
        f"or float fields (n, H, W) or (n, c, H, W) for dense regression"
    )


def _check_finite(values: np.ndarray, name: str) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        raise ValueError(f"{name} have NaN or infinite values in {len(bad)} sample(s), the first is number {bad[0]}")


def _check_alike(train: _Samples, test: _Samples) -> None:
    if train.dense != test.dense or train.x.shape[1:] != test.x.shape[1:] or train.y.shape[1:] != test.y.shape[1:]:
        raise ValueError(
            f"the test file does not match the training file: inputs {tuple(test.x.shape[1:])} against "
            f"{tuple(train.x.shape[1:])}, targets {tuple(test.y.shape[1:])} {test.y.dtype} against "
            f"{tuple(train.y.shape[1:])} {train.y.dtype}"
        )

"""Your own arrays: classification or dense regression from npz, npy, h5 or pt files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orca_rank.artifacts.provenance import contents_hash
from orca_rank.data.array_files import read_arrays
from orca_rank.data.checks import check_inputs, check_targets
from orca_rank.data.fields import LAYOUTS, arranged, kept
from orca_rank.data.labels import Class, check_counts, class_labels, renamed, renaming
from orca_rank.data.module import Encode, InMemory, Parts, check_choice, check_fraction, check_whole
from orca_rank.data.splits import covered, limited, stratified_order, take_test, take_validation
from orca_rank.normaliser import Normaliser, chunk_of
from orca_rank.task import Task, typical_norm

NORMALISE = ("channel", "pixel", "none")
LABELS = ("file", "kmeans", "index")


@dataclass(frozen=True)
class _Samples:
    """x (n, C, H, W) of any real dtype; y int64 (n,), floats (n, c, H, W), or None; what the file calls its classes."""

    x: Tensor
    y: Tensor | None
    classes: tuple[Class, ...] | None = None

    @property
    def targets(self) -> Tensor:
        if self.y is None:
            raise ValueError(
                "there are no targets: name them by the option y; without them data can only be measured and predicted"
            )
        return self.y

    @property
    def dense(self) -> bool:
        return self.targets.is_floating_point()

    def take(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(np.ascontiguousarray(index))
        return self.x[chosen], self.targets[chosen]

    @property
    def labels(self) -> np.ndarray:
        """Classes to split by; one for all fields."""
        return np.zeros(len(self.x), dtype=np.int64) if self.dense else self.targets.numpy()


class Arrays(InMemory):
    """Arrays x and y from files: labels y are classification, float y (n, H, W) or (n, c, H, W) a field.

    Inputs are (n, H, W), (n, C, H, W) or (n, H, W, C); bool, integer or float, in any unit. They are standardised by
    statistics of the training part, taken at the file's own precision; so are the outputs of a field, through
    `task.normaliser`. Labels are whole numbers, whole floats, booleans or strings, (n,) or (n, 1), or one-hot (n, k).

    Args:
        root: the data folder.
        train: an npz, h5 or pt file holding both arrays, or a pair [x.npy, y.npy]; relative to root.
        test: the same for a separate test set. Null: test_fraction of the training file is held out; the same file
            again, with test_x and test_y, for npz files that hold both.
        x, y, test_x, test_y: names of the arrays inside the files, train/x for x in the group train; those of the test
            set default to x and y. y null: without targets data can be measured and predicted, see `everything`.
        labels: "file" reads y. For images without labels: "kmeans" makes `clusters` pseudo-classes of the pixels
            (pooled to at most 16×16), "index" gives every sample its own class, which has no covariance within.
        clusters: number of pseudo-classes.
        channels: where x, and y if y_channels is null, have their axis of channels, if they have one: "first", "last"
            or "none". Null: as the shape says, or an error where it does not.
        y_channels: the same for fields.
        fill: a value or values that mark missing ones, NaN among them: the mean takes their place in inputs, and in
            fields they are not counted. Null: there are none, and what looks like one is an error; "none": no error.
        normalise: "channel" (one mean and deviation a channel), "pixel" (one each per pixel) or "none".
        test_fraction, val_fraction: held out of all, and then of the rest; class by class for classification.
        train_limit: samples for train and val together; null for all. test_limit: of the test set.
        split_seed: of the splits, limits and pseudo-labels.
        batch_size, seed, statistics, classes: see `InMemory`.

    Raises:
        FileNotFoundError, KeyError, ValueError: as `read_arrays`; for wrong shapes, dtypes or labels, NaN, what looks
            like a fill value, inputs or fields that never vary, too few samples in all or of a class.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str | Sequence[str],
        test: str | Sequence[str] | None = None,
        x: str = "x",
        y: str | None = "y",
        test_x: str | None = None,
        test_y: str | None = None,
        labels: str = "file",
        clusters: int = 10,
        channels: str | None = None,
        y_channels: str | None = None,
        fill: float | str | Sequence[float] | None = None,
        normalise: str = "channel",
        test_fraction: float = 0.2,
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
        check_choice("labels", labels, LABELS)
        check_choice("channels", channels, LAYOUTS)
        check_choice("y_channels", y_channels, LAYOUTS)
        check_choice("normalise", normalise, NORMALISE)
        check_fraction("test_fraction", test_fraction)
        check_fraction("val_fraction", val_fraction)
        check_whole("train_limit", train_limit, optional=True)
        check_whole("test_limit", test_limit, optional=True)
        check_whole("split_seed", split_seed, least=0)
        if test is not None and labels != "file":
            raise ValueError(f"labels={labels!r} makes labels for one file; leave test=null or use labels='file'")
        if test == train and (test_x or x) == x:
            raise ValueError(
                f"data.test={test} is the training set itself, and its error would be no test error: name another file "
                f"or, within this one, other arrays by data.test_x and data.test_y; null holds some out"
            )
        self.root, self.train, self.test = Path(root), train, test
        self.x, self.y, self.test_x, self.test_y = x, y, test_x or x, test_y or y
        self.labels, self.clusters, self.normalise, self.fill = labels, clusters, normalise, _fill_values(fill)
        self.channels, self.y_channels = channels, y_channels
        self.test_fraction, self.val_fraction, self.split_seed = test_fraction, val_fraction, split_seed
        self.train_limit, self.test_limit = train_limit, test_limit

    @property
    def contents(self) -> str:
        parts = [[part] if isinstance(part, str) else part for part in (self.train, self.test) if part is not None]
        return contents_hash([self.root / name for part in parts for name in part])

    def load(self) -> Parts:
        everything = self._read(self.train, self.x, self.y)
        if len(everything.x) < 4:
            raise ValueError(
                f"{self.train} holds {len(everything.x)} sample(s): at least 4 are needed to train, validate and test"
            )
        notes = self._check_labels(everything)
        labels = everything.labels
        order = stratified_order(labels, self.split_seed)
        if self.test is None:
            test_order, order = take_test(order, self.test_fraction)
            train, val = take_validation(order, self.val_fraction, self.train_limit)
            train, test_order = covered(train, test_order, labels)
            test = everything.take(limited(test_order, self.test_limit, "test_limit"))
        else:
            train, val = take_validation(order, self.val_fraction, self.train_limit)
            other = self._read(self.test, self.test_x, self.test_y, everything)
            test_order = stratified_order(other.labels, self.split_seed)
            test = other.take(limited(test_order, self.test_limit, "test_limit"))
            notes += _seen(everything.x, test[0], self.test)
        train, val = covered(train, val, labels)
        parts = {"train": everything.take(train), "val": everything.take(val), "test": test}
        inputs = None if self.normalise == "none" else self.inputs(parts["train"][0], self.normalise)
        notes += check_inputs(parts, inputs)
        task = self._task(everything, parts["train"][1])
        notes += check_targets(parts, task)
        encode = (inputs or _AS_IT_IS).encode
        return Parts(task, parts["train"], parts["val"], test, encode, inputs=inputs, notes=tuple(dict.fromkeys(notes)))

    def everything(self) -> tuple[Tensor, Tensor | None]:
        samples = self._read(self.train, self.x, self.y, optional=True)
        return samples.x, samples.y

    @property
    def labelled(self) -> bool:
        return self.labels != "file" or self.y is not None

    def encoder(self) -> Encode:
        if self.normalise == "none":
            return _AS_IT_IS.encode
        if not self.labelled:  # nothing is trained, so that no part of them is held out
            return self.inputs(self.everything()[0], self.normalise).encode
        return self.given.encode if self.given is not None else self.parts.encode

    def _task(self, everything: _Samples, y: Tensor) -> Task:
        channels, height, width = everything.x.shape[1:]
        if everything.dense:
            normaliser = None if self.normalise == "none" else Normaliser.fit(y, self.normalise)
            return Task("dense", (channels, height, width), tuple(y.shape[1:]), normaliser, typical_norm(y))
        count = 1 + int(everything.targets.max()) if everything.classes is None else len(everything.classes)
        names = everything.classes if everything.classes is not None and renamed(everything.classes) else None
        return Task("classification", (channels, height, width), (count,), classes=names)

    def _check_labels(self, everything: _Samples) -> list[str]:
        """Refuse classes that cannot be learned and measured; say what the file's labels are taken for."""
        if everything.classes is None or self.given_classes is not None:
            return []
        name = f"{self.y!r} of {self.train}"
        check_counts(everything.labels, everything.classes, 3 if self.test is None else 2, name)
        return [renaming(everything.classes, name)] if renamed(everything.classes) else []

    def _read(
        self,
        files: str | Sequence[str],
        x_name: str,
        y_name: str | None,
        train: _Samples | None = None,
        *,
        optional: bool = False,
    ) -> _Samples:
        """Samples of a file; `train`: those that they must be like. optional: without targets where it has none."""
        wanted = y_name if self.labels == "file" else None
        x, y, file = read_arrays(self.root, files, x_name, wanted, optional=optional)
        name = f"inputs {x_name!r} of {file}"
        if x.dtype.kind not in "biuf":
            raise ValueError(f"{name} have dtype {x.dtype}: expected bool, integer or float")
        inputs = kept(
            arranged(x, self.channels, name, "data.channels", None), self.fill, name, "data.fill", self.normalise
        )
        if train is not None and inputs.shape[1:] != train.x.shape[1:]:
            raise _unlike(inputs, train.x, "inputs")
        if self.given is not None and self.normalise != "none":
            self.given.check(tuple(inputs.shape[1:]))
        if optional and self.labels != "file":  # made for images that are trained on
            return _Samples(inputs, None)
        if self.labels == "kmeans":
            return _Samples(inputs, pseudo_labels(inputs, self.clusters, self.split_seed))
        if self.labels == "index":
            return _Samples(inputs, torch.arange(len(inputs)))
        if y is None:
            return _Samples(inputs, None)
        known = train.classes if train is not None else self.given_classes
        samples = self._with_targets(inputs, y, f"{y_name!r} of {file}", known)
        if train is not None and (samples.dense != train.dense or samples.targets.shape[1:] != train.targets.shape[1:]):
            raise _unlike(samples.targets, train.targets, "targets")
        return samples

    def _with_targets(self, x: Tensor, y: np.ndarray, name: str, classes: Sequence[Class] | None) -> _Samples:
        if y.ndim == 0 or len(y) != len(x):
            raise ValueError(f"targets {name} have shape {y.shape}: expected {len(x)} of them, one for every input")
        if y.ndim <= 2 or (y.size == len(y) and y.dtype.kind not in "f"):
            found = class_labels(y, name, classes)
            return _Samples(x, torch.from_numpy(found.y), found.classes)
        if y.ndim > 4 or y.dtype.kind not in "bf":
            raise ValueError(
                f"targets {name} have shape {y.shape} and dtype {y.dtype}: expected integer labels (n,) for "
                f"classification, or float fields (n, H, W) or (n, c, H, W) for dense regression"
            )
        grid = (x.shape[2], x.shape[3])
        targets = arranged(y, self._field_layout(y, grid, name), f"targets {name}", "data.y_channels", grid)
        fields = kept(targets, self.fill, f"targets {name}", "data.fill", self.normalise)
        return _Samples(x, fields if fields.is_floating_point() else fields.float())

    def _field_layout(self, y: np.ndarray, grid: tuple[int, int], name: str) -> str | None:
        """Where fields have their channels: as y_channels says, or else as channels does, unless the grid belies it."""
        if self.y_channels is not None or y.ndim != 4 or self.channels not in ("first", "last"):
            return self.y_channels
        grids = {"first": y.shape[2:], "last": y.shape[1:3]}
        other = "last" if self.channels == "first" else "first"
        if grids[self.channels] != grid and grids[other] == grid:
            raise ValueError(
                f"targets {name} have shape {y.shape}; with their channels {self.channels}, as data.channels says, "
                f"they would not be on the inputs' grid {grid}: set data.y_channels={other}"
            )
        return self.channels


_AS_IT_IS = Normaliser(torch.zeros(()), torch.ones(()))


def pseudo_labels(x: Tensor, clusters: int, seed: int, side: int = 16) -> Tensor:
    """K-means classes (n,) of the pixels of x (n, C, H, W), average-pooled to at most side × side.

    Raises:
        ValueError: for fewer than 2 clusters or more than samples.
    """
    if not 2 <= clusters <= len(x):
        raise ValueError(f"clusters must lie between 2 and the number of samples {len(x)}, received {clusters}")
    size = min(side, x.shape[-2]), min(side, x.shape[-1])
    scaled = Normaliser.fit(x, "channel")  # no unit of a channel weighs more than another's
    parts = [F.adaptive_avg_pool2d(scaled.encode(part), size).flatten(1) for part in x.split(chunk_of(x))]
    from sklearn.cluster import KMeans  # here, because it takes a second

    fitted = KMeans(clusters, n_init=1, random_state=seed).fit(torch.cat(parts).numpy())
    return torch.from_numpy(fitted.labels_.astype(np.int64))


def _fill_values(fill: float | str | Sequence[float] | None) -> tuple[float, ...] | None:
    """The option `fill` as values; None for "none"."""
    if fill is None or fill == "none":
        return () if fill is None else None
    values = fill if isinstance(fill, Sequence) else [fill]
    if isinstance(fill, str) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ValueError(f"fill must be a number, numbers, null or none, received {fill!r}")
    return tuple(float(value) for value in values)


def _seen(train: Tensor, test: Tensor, name: object) -> list[str]:
    """A sentence where inputs of a test file stand in the training file too."""
    known = {hash(x.numpy().tobytes()) for x in train}
    if not (count := sum(hash(x.numpy().tobytes()) in known for x in test)):
        return []
    return [f"{count} of {len(test)} test samples of {name} are in the training file too: their error is no test error"]


def _unlike(test: Tensor, train: Tensor, what: str) -> ValueError:
    return ValueError(
        f"the test file does not match the training file: {what} {tuple(test.shape[1:])} {test.dtype} against "
        f"{tuple(train.shape[1:])} {train.dtype}"
    )

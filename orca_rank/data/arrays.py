"""Your own arrays: inputs and targets of any kind from npz, npy, h5, zarr or pt files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orca_rank.artifacts.provenance import contents_hash
from orca_rank.data.array_files import read_arrays
from orca_rank.data.checks import Loaded, check_inputs, check_targets, seen
from orca_rank.data.fields import LAYOUTS
from orca_rank.data.labels import Class, check_counts, renamed, renaming
from orca_rank.data.module import Encode, InMemory, Parts, check_choice, check_fraction, check_whole
from orca_rank.data.pseudo import pseudo_labels
from orca_rank.data.remembered import Judged, place_of, remembered
from orca_rank.data.splits import covered, limited, stratified_order, take_test, take_validation
from orca_rank.data.stored import Stored
from orca_rank.data.targets import Reading, Targets
from orca_rank.normaliser import Normaliser
from orca_rank.task import KINDS

NORMALISE = ("channel", "pixel", "none")
LABELS = ("file", "kmeans", "index")


@dataclass(frozen=True)
class _Samples:
    """x (n, C, H, W) of any real dtype, (n, C, 1, L) for series; targets, or None."""

    x: Tensor
    found: Targets | None

    @property
    def targets(self) -> Targets:
        if self.found is None:
            raise ValueError(
                "there are no targets: name them by the option y; without them data can only be measured and predicted"
            )
        return self.found

    def take(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        return _rows(self.x, index), _rows(self.targets.y, index)


def _rows(x: Tensor, index: np.ndarray) -> Tensor:
    """Samples of a tensor; of one that stays on disk, without reading them."""
    return x.only(index) if isinstance(x, Stored) else x[torch.from_numpy(np.ascontiguousarray(index))]


class Arrays(InMemory):
    """Arrays x and y from files; what kind of task they are follows from y, or is asked for.

    Inputs are images (n, H, W), (n, C, H, W) or (n, H, W, C), or series (n, L), (n, C, L) or (n, L, C), which are held
    as (n, C, 1, L); bool, integer or float, in any unit. They are standardised by statistics of the training part,
    taken at the file's own precision; so are fields and vectors, through `task.normaliser`. Targets are

    - whole numbers, whole floats, booleans or strings (n,) or (n, 1), or one-hot (n, k): classification;
    - numbers (n,) or (n, k), some of them not whole: regression;
    - booleans, or 0 and 1, (n, c) that are not one-hot: multilabel;
    - integers or booleans (n, H, W) of few values, for series (n, L): segmentation;
    - floats (n, H, W) or (n, c, H, W), for series (n, L) or (n, c, L): dense, a field.

    What could be several of these is an error that says how to choose by `task`.

    Args:
        root: the data folder.
        train: an npz, h5 or pt file or zarr folder holding both arrays, or a pair [x.npy, y.npy]; relative to root.
        test: the same for a separate test set. Null: test_fraction of the training file is held out; the same file
            again, with test_x and test_y, for npz files that hold both.
        x, y, test_x, test_y: names of the arrays inside the files, train/x for x in the group train; those of the test
            set default to x and y. y null: without targets data can be measured and predicted, see `everything`.
        labels: "file" reads y. For images without labels: "kmeans" makes `clusters` pseudo-classes of the pixels
            (pooled to at most 16×16), "index" gives every sample its own class, which has no covariance within.
        clusters: number of pseudo-classes.
        task: the kind of y, one of those above; null: as y says. series: whether x are series; null: as x says, which
            (n, C, L) of a long and a short side does not.
        channels: where x, and y if y_channels is null, have their axis of channels, if they have one: "first", "last"
            or "none". Null: as the shape says, or an error where it does not.
        y_channels: the same for fields.
        fill: a value or values that mark missing ones, NaN among them: the mean takes their place in inputs, and in
            fields, vectors and segmentations they are not counted. Null: there are none, and what looks like one is an
            error; "none": no error.
        normalise: "channel" (one mean and deviation a channel), "pixel" (one each per pixel) or "none"; vectors are
            standardised in any case.
        test_fraction, val_fraction: held out of all, and then of the rest, in the same proportions of `Targets.strata`.
        train_limit: samples for train and val together; null for all. test_limit: of the test set.
        in_memory: whether x and y are read whole; null: where both have at most 512 MiB. Otherwise numbers of npy,
            h5 and zarr files stay there: images, series and fields of any size (classes, vectors and segmentations are
            read). Their statistics take one pass, a batch its own rows.
        cache: folder for the statistics of files that stay on disk, so that the next stage does not read all of them
            again; null: none.
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
        task: str | None = None,
        series: bool | None = None,
        channels: str | None = None,
        y_channels: str | None = None,
        fill: float | str | Sequence[float] | None = None,
        normalise: str = "channel",
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        in_memory: bool | None = None,
        cache: str | Path | None = None,
        split_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
        statistics: Mapping[str, Tensor] | None = None,
        classes: Sequence[Class] | None = None,
    ) -> None:
        super().__init__(batch_size, seed, statistics, classes)
        check_choice("labels", labels, LABELS)
        check_choice("task", task, (*KINDS, None))
        check_choice("series", series, (True, False, None))
        check_choice("channels", channels, LAYOUTS)
        check_choice("y_channels", y_channels, LAYOUTS)
        check_choice("in_memory", in_memory, (True, False, None))
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
        self.labels, self.clusters, self.normalise, self.task_kind = labels, clusters, normalise, task
        self.reading = Reading(channels, y_channels, _fill_values(fill), normalise, series, task)
        self.test_fraction, self.val_fraction, self.split_seed = test_fraction, val_fraction, split_seed
        self.train_limit, self.test_limit, self.in_memory = train_limit, test_limit, in_memory
        self.options = [
            *(x, y, test_x, test_y, labels, clusters, task, series, channels, y_channels, fill, normalise),
            *(test is None, test_fraction, val_fraction, train_limit, test_limit, split_seed),
        ]
        self.cache = None if cache is None else Path(cache)

    @property
    def contents(self) -> str:
        """What the files hold; of one of more than 1 GiB, its size and blocks of it all along stand for that."""
        return contents_hash(self._files, sampled=True)

    @property
    def _files(self) -> list[Path]:
        parts = [[part] if isinstance(part, str) else part for part in (self.train, self.test) if part is not None]
        return [self.root / name for part in parts for name in part]

    def load(self) -> Parts:
        everything = self._read(self.train, self.x, self.y)
        if len(everything.x) < 4:
            raise ValueError(
                f"{self.train} holds {len(everything.x)} sample(s): at least 4 are needed to train, validate and test"
            )
        targets = everything.targets
        notes = self._check_labels(targets)
        labels = targets.strata()
        order = stratified_order(labels, self.split_seed)
        if self.test is None:
            test_order, order = take_test(order, self.test_fraction)
            train, val = take_validation(order, self.val_fraction, self.train_limit)
            train, test_order = covered(train, test_order, labels)
            test = everything.take(limited(test_order, self.test_limit, "test_limit"))
        else:
            train, val = take_validation(order, self.val_fraction, self.train_limit)
            other = self._read(self.test, self.test_x, self.test_y, everything)
            test_order = stratified_order(other.targets.strata(), self.split_seed)
            test = other.take(limited(test_order, self.test_limit, "test_limit"))
        train, val = covered(train, val, labels)
        parts = {"train": everything.take(train), "val": everything.take(val), "test": test}
        if isinstance(everything.x, Stored) and self.cache is not None and self.given is None:
            place = place_of(self.cache, self._files, self.options, self.contents)
            found = remembered(place, lambda: self._judge(parts, targets))
        else:
            found = self._judge(parts, targets)
        encode = (found.inputs or _AS_IT_IS).encode
        said = tuple(dict.fromkeys([*notes, *found.notes]))
        return Parts(found.task, parts["train"], parts["val"], test, encode, inputs=found.inputs, notes=said)

    def _judge(self, parts: Loaded, targets: Targets) -> Judged:
        """Statistics and notes, by passes over all rows."""
        x, y = parts["train"]
        inputs = None if self.normalise == "none" and self.given is None else self.inputs(x, self.normalise)
        notes = check_inputs(parts, inputs) + seen(parts, self.test or self.train)
        task = targets.task(x, y, self.normalise)
        return Judged(task, inputs, (*notes, *check_targets(parts, task)))

    def everything(self) -> tuple[Tensor, Tensor | None]:
        samples = self._read(self.train, self.x, self.y, optional=True)
        return samples.x, None if samples.found is None else samples.found.y

    @property
    def labelled(self) -> bool:
        return self.labels != "file" or self.y is not None

    def encoder(self) -> Encode:
        if self.given is not None:  # as the model was trained, whatever `normalise` says
            return self.given.encode
        if self.normalise == "none":
            return _AS_IT_IS.encode
        if not self.labelled:  # nothing is trained, so that no part of them is held out
            return self.inputs(self.everything()[0], self.normalise).encode
        return self.parts.encode

    def _check_labels(self, targets: Targets) -> list[str]:
        """Refuse classes that cannot be learned and measured; say what the file's targets are taken for."""
        if self.labels != "file" or self.given_kind is not None:
            return []
        name = f"{self.y!r} of {self.train}"
        notes = [f"targets {name} are taken for a {targets.kind} task; data.task says otherwise"]
        if targets.kind in ("classification", "regression", "dense") or self.task_kind is not None:
            notes = []
        if targets.classes is None or self.given_classes is not None:
            return notes
        if targets.kind == "classification":
            check_counts(targets.y.numpy(), targets.classes, 3 if self.test is None else 2, name)
        return [*notes, renaming(targets.classes, name)] if renamed(targets.classes) else notes

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
        x, y, file = read_arrays(
            self.root, files, x_name, wanted, optional=optional, in_memory=self.in_memory, fill=self.reading.fill
        )
        inputs = self.reading.inputs(x, f"inputs {x_name!r} of {file}")
        if train is not None and inputs.shape[1:] != train.x.shape[1:]:
            raise _unlike(inputs, train.x, "inputs")
        if self.given is not None:
            self.given.check(tuple(inputs.shape[1:]))
        if optional and self.labels != "file":  # made for images that are trained on
            return _Samples(inputs, None)
        if self.labels == "kmeans":
            return _Samples(inputs, Targets("classification", pseudo_labels(inputs, self.clusters, self.split_seed)))
        if self.labels == "index":
            return _Samples(inputs, Targets("classification", torch.arange(len(inputs))))
        if y is None:
            return _Samples(inputs, None)
        known = train.targets.kind if train is not None else self.given_kind
        classes = train.targets.classes if train is not None else self.given_classes
        found = self.reading.targets(y, inputs, f"{y_name!r} of {file}", classes, known)
        if train is not None and (found.kind != train.targets.kind or found.y.shape[1:] != train.targets.y.shape[1:]):
            raise _unlike(found.y, train.targets.y, "targets")
        return _Samples(inputs, found)


_AS_IT_IS = Normaliser(torch.zeros(()), torch.ones(()))


def _fill_values(fill: float | str | Sequence[float] | None) -> tuple[float, ...] | None:
    """The option `fill` as values; None for "none"."""
    if fill is None or fill == "none":
        return () if fill is None else None
    values = fill if isinstance(fill, Sequence) else [fill]
    if isinstance(fill, str) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ValueError(f"fill must be a number, numbers, null or none, received {fill!r}")
    return tuple(float(value) for value in values)


def _unlike(test: Tensor, train: Tensor, what: str) -> ValueError:
    return ValueError(
        f"the test file does not match the training file: {what} {tuple(test.shape[1:])} {test.dtype} against "
        f"{tuple(train.shape[1:])} {train.dtype}"
    )

"""What the targets of a file mean, where their shape and numbers say it, and the tensors that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from orca_rank.data.fields import arranged, arranged_series, kept, kept_or_stored
from orca_rank.data.labels import Class, class_labels
from orca_rank.data.stored import Rows
from orca_rank.normaliser import Normaliser
from orca_rank.scoring import UNLABELLED
from orca_rank.task import KINDS, Task, typical_norm

FEW = 64  # different values of what is taken for a segmentation unasked
STRATA = 10  # parts of equally many samples that vectors are split by
TAKEN = {
    "classification": "integer labels or strings (n,), or one-hot rows (n, k)",
    "multilabel": "booleans or 0 and 1 (n, c)",
    "regression": "numbers (n,) or (n, k)",
    "segmentation": "whole numbers (n, H, W), for series (n, L)",
    "dense": "numbers (n, H, W) or (n, c, H, W), for series (n, L) or (n, c, L)",
}


@dataclass(frozen=True)
class Reading:
    """How arrays are read: the options of `orca_rank.data.arrays.Arrays` of the same names."""

    channels: str | None = None
    y_channels: str | None = None
    fill: tuple[float, ...] | None = ()
    normalise: str = "channel"
    series: bool | None = None
    task: str | None = None

    def inputs(self, x: np.ndarray | Rows, name: str) -> Tensor:
        """(n, C, H, W), for series (n, C, 1, L).

        Raises:
            ValueError: for another dtype or shape, or one that could be series or images.
        """
        if x.dtype.kind not in "biuf":
            raise ValueError(f"{name} have dtype {x.dtype}: expected bool, integer or float")
        arrange = arranged_series if is_series(x, self.series, name) else arranged

        def arranged_so(rows: np.ndarray) -> np.ndarray:
            return arrange(rows, self.channels, name, "data.channels", None)

        return kept_or_stored(x, arranged_so, self.fill, name, "data.fill", self.normalise)

    def targets(
        self, y: np.ndarray | Rows, x: Tensor, name: str, classes: Sequence[Class] | None, known: str | None
    ) -> Targets:
        """Targets of the inputs x (n, C, H, W).

        Args:
            name: for messages. classes: what they are called, where training data or a model say so. known: the kind of
                task of a fine-tuned model or of the training data, for targets that could be of several.

        Raises:
            ValueError: for targets that do not say what they are, or are not what data.task says.
        """
        if y.ndim == 0 or len(y) != len(x):
            raise ValueError(f"targets {name} have shape {y.shape}: expected {len(x)} of them, one for every input")
        grid = (x.shape[2], x.shape[3])
        kind = kind_of(y if isinstance(y, np.ndarray) else y.sample, grid, name, self.task, known)
        if kind == "dense":
            return Targets(kind, self._fields(y, grid, name))
        y = y if isinstance(y, np.ndarray) else y.read(0, len(y))
        if kind == "classification":
            found = class_labels(y, name, classes)
            return Targets(kind, torch.from_numpy(found.y), found.classes)
        if kind == "multilabel":
            return Targets(kind, torch.from_numpy(np.asarray(y == 1)))
        if kind == "regression":
            column = np.reshape(y, (len(y), -1))[:, :, None, None]
            return Targets(
                kind, _floats(kept(column, self.fill, f"targets {name}", "data.fill", "channel"))[:, :, 0, 0]
            )
        return _pixel_classes(y.reshape(len(y), *_grid_of(y, grid)), name, self.fill or (), classes)

    def _fields(self, y: np.ndarray | Rows, grid: tuple[int, int], name: str) -> Tensor:
        series, layout = grid[0] == 1, self._field_layout(y, grid, name)

        def arranged_so(rows: np.ndarray) -> np.ndarray:
            found = (arranged_series if series else arranged)(rows, layout, f"targets {name}", "data.y_channels", grid)
            return found if found.dtype.kind == "f" or isinstance(y, np.ndarray) else found.astype(np.float64)

        what, per = f"targets {name}", self.normalise
        return _floats(kept_or_stored(y, arranged_so, self.fill, what, "data.fill", per, fields=True))

    def _field_layout(self, y: np.ndarray | Rows, grid: tuple[int, int], name: str) -> str | None:
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


@dataclass(frozen=True)
class Targets:
    """Targets as `orca_rank.task.KINDS` says for their kind; classes: what the file calls the classes 0, 1, …."""

    kind: str
    y: Tensor
    classes: tuple[Class, ...] | None = None

    def strata(self) -> Int[np.ndarray, " n"]:
        """What to split by, so that every part holds all of it: the class; the rarest label of a sample, or class of a
        segmentation; the tenth of the samples by their place along the direction in which vectors vary most; nothing
        for fields."""
        if self.kind == "classification":
            return self.y.numpy()
        if self.kind == "multilabel":
            return _rarest(self.y.numpy())
        if self.kind == "segmentation":
            pixels = self.y.flatten(1)
            return _rarest(np.stack([(pixels == k).any(1).numpy() for k in range(len(self.classes or ()))], 1))
        if self.kind == "regression":
            z = _standardised(self.y)
            along = z @ np.linalg.svd(z, full_matrices=False)[2][0]
            place = np.argsort(np.argsort(along, kind="stable"), kind="stable")
            return place * min(STRATA, max(1, len(z) // STRATA)) // len(z)
        return np.zeros(len(self.y), dtype=np.int64)

    def task(self, x: Tensor, train: Tensor, normalise: str) -> Task:
        """The task.

        Args:
            x: inputs (n, C, H, W). train: the targets that are trained on, whose statistics are taken. normalise: of
                fields; vectors are standardised in any case.
        """
        shape = x.shape[1], x.shape[2], x.shape[3]
        if self.kind == "classification":
            count = 1 + int(self.y.max()) if self.classes is None else len(self.classes)
            return Task(self.kind, shape, (count,), classes=_names(self.classes))
        if self.kind == "multilabel":
            return Task(self.kind, shape, (train.shape[1],))
        if self.kind == "segmentation":
            output = (len(self.classes or ()), *train.shape[1:])
            return Task(self.kind, shape, output, classes=_names(self.classes))
        if self.kind == "regression":
            return Task(self.kind, shape, (train.shape[1],), Normaliser.fit(train, "channel"))
        normaliser = None if normalise == "none" else Normaliser.fit(train, normalise)
        return Task(self.kind, shape, tuple(train.shape[1:]), normaliser, typical_norm(train))


def is_series(x: np.ndarray | Rows, asked: bool | None, name: str) -> bool:
    """Whether inputs are series (n, L), (n, C, L) or (n, L, C) rather than images.

    Raises:
        ValueError: for a shape that could be both, or is not what `asked` says.
    """
    if asked and x.ndim not in (2, 3):
        raise ValueError(f"{name} have shape {x.shape}; with data.series=true expected (n, L), (n, C, L) or (n, L, C)")
    if asked is not None or x.ndim == 2:
        return asked is True or x.ndim == 2
    if x.ndim == 3 and max(x.shape[1:]) >= 8 * min(x.shape[1:]):
        a, b = x.shape[1:]
        raise ValueError(
            f"{name} have shape {x.shape}, which could be series, {min(a, b)} channels of length {max(a, b)}, or "
            f"images of {a}×{b} pixels: say which with data.series=true or data.series=false"
        )
    return False


def kind_of(y: np.ndarray, grid: tuple[int, int], name: str, asked: str | None, known: str | None) -> str:
    """The kind of task that targets are of.

    Args:
        grid: (H, W) of the inputs, (1, L) of series. asked: data.task, which must fit. known: one that is taken if it
            fits.

    Raises:
        ValueError: for targets that could be of several kinds, or of none, saying of which.
    """
    fitting = [kind for kind in KINDS if _fits(y, kind, grid)]
    here = f"targets {name} have shape {y.shape} and dtype {y.dtype}"
    if asked is not None and asked not in fitting:
        raise ValueError(f"{here}; with data.task={asked} expected {TAKEN[asked]}")
    if asked is not None or known in fitting:
        return str(asked or known)
    meant = _meant(y, grid)
    if len(meant) == 1:
        return meant[0]
    if could := [kind for kind in meant or fitting if kind in fitting]:
        said = ", or ".join(f"data.task={kind} for {TAKEN[kind]}" for kind in could)
        raise ValueError(f"{here}, which do not say what they are: set {said}")
    raise ValueError(f"{here}: expected {'; '.join(f'{taken} ({kind})' for kind, taken in TAKEN.items())}")


def _fits(y: np.ndarray, kind: str, grid: tuple[int, int]) -> bool:
    """Whether targets can be read as this kind at all."""
    one, numeric, series = y.size == len(y), y.dtype.kind in "biuf", grid[0] == 1
    if kind == "classification":
        return y.ndim == 1 or one or (y.ndim == 2 and (not numeric or _one_hot(y)))
    if kind == "multilabel":
        return numeric and y.ndim == 2 and y.shape[1] > 1 and _binary(y)
    if kind == "regression":
        return numeric and (y.ndim == 2 or one)
    if kind == "segmentation":
        return numeric and not one and len(_grid_of(y, grid)) == (1 if series else 2) + series and _whole(y)
    return numeric and not one and y.ndim in ((2, 3) if series else (3, 4))


def _meant(y: np.ndarray, grid: tuple[int, int]) -> tuple[str, ...]:
    """The kinds that targets may mean; one where there is no doubt."""
    float_, series = y.dtype.kind == "f", grid[0] == 1
    if y.ndim <= 1 or y.size == len(y) or (y.ndim == 2 and y.dtype.kind not in "biuf"):
        return ("regression",) if float_ and _fractional(y) else ("classification",)
    if y.ndim == 2 and not (series and y.shape[1] == grid[1]):
        if _binary(y):
            return ("classification",) if _one_hot(y) else ("multilabel",)
        return ("regression",) if float_ else ()
    if not _fits(y, "dense", grid):
        return ()
    if not _fits(y, "segmentation", grid):
        return ("dense",) if float_ else ()
    few = y.dtype.kind == "b" or 2 <= len(np.unique(y)) <= FEW
    labels = y.ndim == 2 and _binary(y)  # of a series as long as there are labels
    if float_ or labels or not few:
        return ("segmentation", "dense", *(("multilabel",) if labels else ())) if few or not float_ else ("dense",)
    return ("segmentation",)


def _grid_of(y: np.ndarray, grid: tuple[int, int]) -> tuple[int, ...]:
    """(H, W) of targets with one value a pixel, (1, L) for series; () where they are not."""
    if grid[0] == 1:
        sides = [side for side in y.shape[1:] if side != 1] or [1]
        return (1, sides[0]) if y.ndim in (2, 3) and len(sides) == 1 else ()
    if y.ndim == 4 and y.shape[3] == 1 and y.shape[1] != 1:
        return y.shape[1:3]
    if y.ndim == 4 and y.shape[1] == 1:
        return y.shape[2:]
    return y.shape[1:] if y.ndim == 3 else ()


def _binary(y: np.ndarray) -> bool:
    return bool(((y == 0) | (y == 1)).all())


def _one_hot(y: np.ndarray) -> bool:
    return _binary(y) and bool((y.sum(1) == 1).all())


def _whole(y: np.ndarray) -> bool:
    return y.dtype.kind != "f" or all(bool((np.isfinite(part) & (part == np.floor(part))).all()) for part in (y[:1], y))


def _fractional(y: np.ndarray) -> bool:
    """Whether a finite number is not whole."""
    return bool((np.isfinite(y) & (y != np.floor(y))).any())


def _floats(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()


def _pixel_classes(y: np.ndarray, name: str, fill: Sequence[float], classes: Sequence[Class] | None) -> Targets:
    """Classes (n, H, W) as numbers from 0, those of a fill value unlabelled."""
    missing = np.isin(y, [value for value in fill if value == value])
    if len(bare := np.flatnonzero(missing.reshape(len(y), -1).all(1))):
        raise ValueError(
            f"targets {name} have {len(bare)} sample(s) without a labelled pixel, the first is number {bare[0]}: leave "
            f"these out, there is nothing to learn or measure of them"
        )
    found = class_labels(y[~missing], name, classes)
    numbers = np.full(y.shape, UNLABELLED, np.int16 if len(found.classes) < 2**15 else np.int64)
    numbers[~missing] = found.y
    return Targets("segmentation", torch.from_numpy(numbers), found.classes)


def _rarest(present: np.ndarray) -> Int[np.ndarray, " n"]:
    """Of what is present (n, c) in each sample that which the fewest samples have; c where there is nothing."""
    counts = present.sum(0)
    weight = np.where(present, counts.max(initial=0) + 1 - counts, 0)
    return np.where(present.any(1), weight.argmax(1), present.shape[1]).astype(np.int64)


def _standardised(y: Tensor) -> np.ndarray:
    return Normaliser.fit(y, "channel").encode(y).double().numpy()


def _names(classes: tuple[Class, ...] | None) -> tuple[Class, ...] | None:
    """What classes are called, where that is not 0, 1, …."""
    return classes if classes is not None and list(classes) != list(range(len(classes))) else None

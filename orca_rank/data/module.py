"""What the datasets share: tensors in memory, seeded stratified splits, deterministic loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from orca_rank.task import Task

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Parts:
    """A loaded dataset.

    Args:
        task: shapes, loss and metric.
        train, val, test: (x, y) each; x as stored, (n, C, H, W) of any dtype, y int64 (n,) or float32 (n, c, H, W).
        encode: stored inputs (B, C', H, W) to the network's inputs, float32 (B, C, H, W).
        augment: random change of stored training inputs, drawn from the generator.
    """

    task: Task
    train: Pair
    val: Pair
    test: Pair
    encode: Callable[[Tensor], Tensor]
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None


class InMemory(LightningDataModule, ABC):
    """A dataset held in memory and loaded when first asked for; a subclass says what it holds in `load`.

    Args:
        batch_size: samples per batch.
        seed: of the training order and augmentation. Splits do not depend on it.
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, received {batch_size}")
        self.batch_size, self.seed = batch_size, seed

    @abstractmethod
    def load(self) -> Parts:
        """Read or make the data."""

    @cached_property
    def parts(self) -> Parts:
        return self.load()

    @property
    def task(self) -> Task:
        return self.parts.task

    @property
    def outline(self) -> Task:
        """The task's shapes; a dataset that knows them beforehand answers without loading."""
        return self.task

    @property
    def contents(self) -> str | None:
        """A hash of the files that the data are read from; None for data that follow from the options."""
        return None

    def setup(self, stage: str | None = None) -> None:
        """Load now, so that bad data fails before training starts."""
        self.parts  # noqa: B018 (the property loads)

    def loader(self, part: str, *, shuffle: bool = False, augment: bool = False) -> DataLoader:
        """A loader over "train", "val" or "test"; the same calls give the same batches in the same order."""
        if part not in ("train", "val", "test"):
            raise ValueError(f"part must be 'train', 'val' or 'test', received {part!r}")
        parts = self.parts
        x, y = getattr(parts, part)
        dataset = _Batches(x, y, parts.encode, parts.augment if augment else None)
        sampler = _EpochOrder(dataset, self.seed) if shuffle else None
        return DataLoader(dataset, self.batch_size, sampler=sampler, collate_fn=_as_it_is)

    def train_dataloader(self) -> DataLoader:
        return self.loader("train", shuffle=True, augment=True)

    def val_dataloader(self) -> DataLoader:
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        return self.loader("test")


class _Batches(Dataset):
    """Fetches a whole batch of indices at once, so that encoding and augmentation work on batches."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        encode: Callable[[Tensor], Tensor],
        augment: Callable[[Tensor, torch.Generator], Tensor] | None,
    ) -> None:
        self.x, self.y, self.encode, self.augment = x, y, encode, augment
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: Sequence[int]) -> Pair:
        index = torch.as_tensor(indices)
        x = self.x[index]
        if self.augment is not None:
            x = self.augment(x, self.generator)
        return self.encode(x), self.y[index]

    def __getitem__(self, index: int) -> Pair:
        x, y = self.__getitems__([index])
        return x[0], y[0]


class _EpochOrder(Sampler):
    """A new order and new augmentation draws each epoch that depend on (seed, epoch) alone.

    Lightning calls `set_epoch`, so a resumed run goes on with the very batches that an uninterrupted one would see.
    """

    def __init__(self, dataset: _Batches, seed: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        self.dataset.generator.manual_seed(1_000_003 * self.seed + self.epoch)
        self.epoch += 1
        yield from torch.randperm(len(self.dataset), generator=self.dataset.generator).tolist()


def _as_it_is(batch: Pair) -> Pair:
    return batch


@dataclass(frozen=True)
class Affine:
    """Stored inputs to float32, (x − mean) / std; a class rather than a closure so that it can be pickled."""

    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std


def channel_statistics(x: Tensor, chunk: int = 1024) -> Pair:
    """Mean and standard deviation of every channel of x (n, C, H, W), each (C, 1, 1) float32, in float64 sums.

    A constant channel gets standard deviation 1.
    """
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in x.split(chunk):
        values = part.double()
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = x.numel() / x.shape[1]
    mean = total / count
    variance = squares / count - mean.square()
    std = torch.where(variance > 1e-12 * (1 + mean.square()), variance.clamp_min(0).sqrt(), 1.0)
    return mean.float()[:, None, None], std.float()[:, None, None]


def stratified_order(labels: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"]:
    """A seeded permutation every prefix of which holds the classes in their proportions, to within one sample each."""
    random = np.random.default_rng(seed)
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        key[members] = (np.arange(len(members)) + random.random()) / len(members)
    return np.argsort(key, kind="stable")


def take_test(order: Int[np.ndarray, " n"], fraction: float) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """Split an order into (test, rest)."""
    if not 0 < fraction < 1:
        raise ValueError(f"a fraction held out must lie between 0 and 1, received {fraction}")
    count = max(1, round(fraction * len(order)))
    return order[:count], order[count:]


def take_validation(
    order: Int[np.ndarray, " n"], fraction: float, limit: int | None
) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """(train, val) out of the first `limit` entries of an order.

    Raises:
        ValueError: if fewer than 2 samples are left to train on.
    """
    chosen = limited(order, limit, "train_limit")
    val, train = take_test(chosen, fraction)
    if len(train) < 2:
        raise ValueError(
            f"only {len(train)} sample(s) left to train on out of {len(order)} (train_limit={limit}, "
            f"val_fraction={fraction}): at least 2 are needed, give more data or raise train_limit"
        )
    return train, val


def limited(order: Int[np.ndarray, " n"], limit: int | None, name: str) -> Int[np.ndarray, " m"]:
    """The first `limit` entries, or all."""
    if limit is not None and limit < 1:
        raise ValueError(f"{name} must be at least 1 or null, received {limit}")
    return order[:limit]

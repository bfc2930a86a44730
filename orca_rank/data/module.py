"""What the datasets share: tensors in memory, deterministic loaders, given or fitted statistics of the inputs."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from orca_rank.normaliser import Normaliser
from orca_rank.task import Task

Pair = tuple[Tensor, Tensor]
Encode = Callable[[Tensor], Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]
PARTS = ("train", "val", "test")

log = logging.getLogger("orca_rank.data")


@dataclass(frozen=True)
class Parts:
    """A loaded dataset.

    Args:
        task: shapes, loss and metric.
        train, val, test: (x, y) each; x as stored, (n, C, H, W) of any dtype, (n, C, 1, L) for series; y classes (n,)
            or (n, H, W), booleans (n, labels), or floats (n, k) or (n, c, H, W) in physical units: float32, or float64
            where float32 cannot hold them.
        encode: stored inputs (B, C', H, W) to the network's inputs, float32 (B, C, H, W).
        augment: random change of stored training inputs, drawn from the generator.
        inputs: the statistics that `encode` standardises by; None where it does not.
        notes: what a user should know about the data, a sentence each.
    """

    task: Task
    train: Pair
    val: Pair
    test: Pair
    encode: Encode
    augment: Augment | None = None
    inputs: Normaliser | None = None
    notes: tuple[str, ...] = ()


class InMemory(ABC):
    """A dataset held in memory and loaded when first asked for; a subclass says what it holds in `load`.

    It has the hooks of a LightningDataModule without being one: importing lightning takes seconds, and stages that
    train nothing do without.

    Args:
        batch_size: samples per batch.
        seed: of the training order and augmentation. Splits do not depend on it.
        statistics: normalise inputs by these, as `statistics` of another module gave them, and not by their own: what
            new data for a fine-tuned model need. classes: what its classes 0, 1, … are called, `task.classes`.

    Attributes: given_kind: of the task of such a model, by which targets are read where they could be several.

    Raises:
        ValueError: for a batch size below 1, or statistics that are none.
    """

    def __init__(
        self,
        batch_size: int,
        seed: int,
        statistics: Mapping[str, Tensor] | None = None,
        classes: Sequence[int | str] | None = None,
    ) -> None:
        check_whole("batch_size", batch_size)
        check_whole("seed", seed, least=0)
        self.batch_size, self.seed = batch_size, seed
        self.given = Normaliser.from_dict(statistics) if statistics else None
        self.given_classes = None if classes is None else tuple(classes)
        self.given_kind: str | None = None

    @abstractmethod
    def load(self) -> Parts:
        """Read or make the data."""

    @cached_property
    def parts(self) -> Parts:
        parts = self.load()
        for note in parts.notes:
            log.warning(note)
        return parts

    @property
    def task(self) -> Task:
        return self.parts.task

    @property
    def outline(self) -> Task:
        """The task's shapes; a dataset that knows them beforehand answers without loading."""
        return self.task

    @property
    def labelled(self) -> bool:
        """Whether there are targets; without them data can be measured and predicted, whole, by `loader("all")`."""
        return True

    @property
    def contents(self) -> str | None:
        """A hash of the files that the data are read from; None for data that follow from the options."""
        return None

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What inputs are normalised by, as plain tensors {"mean", "std"} for the argument of the same name; empty
        where they are not."""
        inputs = self.given or self.parts.inputs
        return {} if inputs is None else inputs.to_dict()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the data, a sentence each; also logged when they are loaded."""
        return self.parts.notes

    def everything(self) -> tuple[Tensor, Tensor | None]:
        """(x, y) of all samples, x as stored: the whole training file in its own order where the data come from one,
        whether or not it has targets (y is then None); by default train, val and test one after the other."""
        pairs = [getattr(self.parts, part) for part in PARTS]
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])

    def encoder(self) -> Encode:
        """Stored inputs to the network's inputs, by the statistics that were given, if any."""
        return self.parts.encode

    def inputs(self, x: Tensor, per: str) -> Normaliser:
        """The given statistics, or those of x (n, C, H, W).

        Raises:
            ValueError: if the given statistics are of other channels or another grid.
        """
        if self.given is None:
            return Normaliser.fit(x, per)
        self.given.check(tuple(x.shape[1:]))
        return self.given

    def prepare_data(self) -> None:  # noqa: B027 (most have nothing to fetch)
        """Fetch what is not there yet: nothing, unless a subclass does."""

    def setup(self, stage: str | None = None) -> None:
        """Load now, so that bad data fails before training starts."""
        self.parts  # noqa: B018 (the property loads)

    def loader(self, part: str, *, shuffle: bool = False, augment: bool = False) -> DataLoader:
        """A loader over "train", "val", "test" or "all"; the same calls give the same batches in the same order.

        "all" is `everything`, whose batches are (x, None) where there are no targets.
        """
        if part not in (*PARTS, "all"):
            raise ValueError(f"part must be 'train', 'val' or 'test', or 'all', received {part!r}")
        if part == "all":
            x, y = self.everything()
            dataset = Batches(x, y, self.encoder())
        else:
            x, y = getattr(self.parts, part)
            dataset = Batches(x, y, self.parts.encode, self.parts.augment if augment else None)
        sampler = EpochOrder(len(dataset), self.seed, dataset.draws) if shuffle else None
        return DataLoader(dataset, self.batch_size, sampler=sampler, collate_fn=as_it_is)

    def train_dataloader(self) -> DataLoader:
        return self.loader("train", shuffle=True, augment=True)

    def val_dataloader(self) -> DataLoader:
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        return self.loader("test")


class Batches(Dataset):
    """Fetches a whole batch of indices at once, so that encoding and augmentation work on batches.

    Args:
        x, y: samples and targets, or None. encode: of x; None leaves it. augment: of x before that, by `draws`.

    Attributes:
        share: the samples of a batch that are given, where several processes share it (`shares.share`).
    """

    def __init__(
        self, x: Tensor, y: Tensor | None, encode: Encode | None = None, augment: Augment | None = None
    ) -> None:
        self.x, self.y, self.encode, self.augment = x, y, encode, augment
        self.draws = torch.Generator()
        self.share = slice(None)

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        index = torch.as_tensor(indices)
        own = self.share if range(len(index))[self.share] else slice(1)  # all processes take part in every step
        if self.augment is None:
            index = index[own]
            x = self.x[index]
        else:
            x, index = self.augment(self.x[index], self.draws)[own], index[own]
        return x if self.encode is None else self.encode(x), None if self.y is None else self.y[index]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:
        x, y = self.__getitems__([index])
        return x[0], None if y is None else y[0]


class EpochOrder(Sampler[int]):
    """A new order each epoch that depends on (seed, epoch) alone, and with it new draws of the augmentation.

    Lightning calls `set_epoch`, so a resumed run goes on with the very batches that an uninterrupted one would see.

    Args:
        count: samples. seed: of the order. draws: a generator that is seeded with the epoch too.
    """

    def __init__(self, count: int, seed: int, draws: torch.Generator | None = None) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        self.draws = torch.Generator() if draws is None else draws

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.draws.manual_seed(1_000_003 * self.seed + self.epoch)
        self.epoch += 1
        yield from torch.randperm(self.count, generator=self.draws).tolist()


def as_it_is(batch: Any) -> Any:
    """Collates what is a batch already."""
    return batch


def check_whole(name: str, value: Any, least: int = 1, *, optional: bool = False) -> None:
    """Raise ValueError unless an option is a whole number of at least `least`, or null where that is allowed."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        also = " or null" if optional else ""
        raise ValueError(f"{name} must be a whole number of at least {least}{also}, received {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Raise ValueError unless an option is a number between 0 and 1, neither of them included."""
    if isinstance(value, bool) or not isinstance(value, float | int) or not 0 < value < 1:
        raise ValueError(f"{name} must be a number between 0 and 1, received {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless an option is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, received {value!r}")

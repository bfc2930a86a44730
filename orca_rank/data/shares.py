"""What one process of several sees of every batch: data.batch_size counts the samples of all of them together."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import BatchSampler, DataLoader

from orca_rank.data.module import Batches


class Sizes(NamedTuple):
    """The samples of every batch of a loader: `batch_size`, and in the last one what is left of `samples`."""

    samples: int
    batch_size: int

    def batch(self, index: int) -> int:
        """Samples of batch 0, 1, …, over all processes."""
        return min(self.batch_size, self.samples - index * self.batch_size)

    def own(self, index: int, rank: int, size: int) -> int:
        """Those of them that process `rank` of `size` sees; 0 where there are fewer samples than processes."""
        return len(range(rank, self.batch(index), size))

    def window(self, index: int, batches: int, accumulate: int) -> tuple[int, int]:
        """(samples, batches) of the optimiser step that batch `index` belongs to; an epoch's last may be shorter.

        Args:
            batches: of an epoch. accumulate: batches per optimiser step.
        """
        start = index - index % accumulate
        among = range(start, min(start + accumulate, batches))
        return sum(self.batch(i) for i in among), len(among)


def sizes_of(loader: Any) -> Sizes | None:
    """The sizes of a loader's batches; None where they are not known beforehand."""
    batches: Any = getattr(loader, "batch_sampler", None)
    if type(batches) not in (BatchSampler, Shares):
        return None
    return Sizes(len(batches.sampler), batches.batch_size)


def share(loader: DataLoader, rank: int, size: int, option: str = "data.batch_size") -> DataLoader:
    """A loader of the same batches in the same order, of each of which process `rank` of `size` sees every size-th
    sample from number `rank` on: together they see what the loader gives.

    A process whose share of a batch is empty gets the batch's first sample, since all must take part in every step:
    `Sizes.own` says so. Augmentation is drawn for the whole batch, so that it does not depend on the number of
    processes.

    Args:
        option: that says how many samples a batch has.

    Raises:
        ValueError: for a loader whose batches are not known beforehand, or smaller than the number of processes.
    """
    if size == 1:
        return loader
    sizes = sizes_of(loader)
    if sizes is None:
        raise ValueError(
            f"several processes share the batches of a DataLoader with a batch_size over a dataset with a length; this "
            f"{type(loader).__name__} makes its batches itself: give it a batch_size and a sampler, or set "
            f"trainer=default"
        )
    if sizes.batch_size < size:
        raise ValueError(
            f"{option}={sizes.batch_size} is shared by {size} processes: expected at least a sample for each"
        )
    dataset, batches = loader.dataset, loader.batch_sampler
    if isinstance(dataset, Batches):
        own = copy.copy(dataset)  # with the same generator of draws
        own.share = slice(rank, None, size)
        dataset = own
    else:
        batches = Shares(loader.sampler, loader.batch_size, loader.drop_last, rank, size)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
        generator=loader.generator,
        timeout=loader.timeout,
    )


class Shares(BatchSampler):
    """The batches of a sampler, of each of which one process sees its share; see `share`."""

    def __init__(self, sampler: Any, batch_size: Any, drop_last: bool, rank: int, size: int) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.rank, self.size = rank, size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[self.rank :: self.size] or batch[:1]

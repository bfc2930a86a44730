"""Datasets: data modules with a `.task`; train, val and test never overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch.utils.data import DataLoader

from orca_rank.task import Task

if TYPE_CHECKING:

    class Data(Protocol):
        """What a stage asks of a dataset; `orca_rank.data.module.InMemory` gives the rest.

        Batches are (x, y): x (B, C, H, W) float32 as the network reads them, y as `orca_rank.task.KINDS` says for the
        kind of task.
        """

        @property
        def task(self) -> Task:
            """Shapes, loss and metric."""

        def prepare_data(self) -> None: ...

        def setup(self, stage: str) -> None:
            """Make the loaders of "fit" (train and val) or "test" ready."""

        def train_dataloader(self) -> DataLoader[Any]: ...

        def val_dataloader(self) -> DataLoader[Any]: ...

        def test_dataloader(self) -> DataLoader[Any]: ...

else:
    Data = Any  # isinstance of a protocol would ask for `task`, which loads the data


def count(loader: DataLoader[Any]) -> int:
    """How many samples a loader's dataset holds."""
    dataset: Any = loader.dataset
    return len(dataset)

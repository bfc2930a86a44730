"""curve.csv, the learning curve that every training stage leaves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from orca_rank.artifacts.files import write_csv
from orca_rank.processes import first, total


class RunningMean:
    """The mean of an epoch's losses, weighted by the samples that each is of; on the losses' device, over all processes
    of the run."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.weight = 0

    def add(self, value: Tensor, weight: int = 1) -> None:
        self.total, self.weight = self.total + weight * value.detach(), self.weight + weight

    def take(self) -> Tensor:
        """The mean, and begin anew; all processes together."""
        value = torch.as_tensor(self.total)
        value, weight = total(torch.stack([value, value.new_tensor(self.weight)]))
        self.total, self.weight = 0.0, 0
        return value / weight


class Rates(Callback):
    """The learning rate of every parameter group at each epoch's start, as lr/<its name> in every logger."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        groups = trainer.optimizers[0].param_groups
        names = [f"lr/{group.get('name', place)}" for place, group in enumerate(groups)] if len(groups) > 1 else ["lr"]
        rates = {name: float(group["lr"]) for name, group in zip(names, groups, strict=True)}
        for logger in trainer.loggers:
            logger.log_metrics({**rates, "epoch": trainer.current_epoch}, trainer.global_step)


class Curve(Callback):
    """One row an epoch; rewritten whole, so that a resumed run goes on where it stopped.

    Args:
        path: of the file.
        columns: in this order: epoch, lr (of the first parameter group, at the epoch's start), seconds (of the epoch),
            and names of what the module logs. None is epoch, lr and everything logged as <part>/<name>, val/ first.
        first: number of the first epoch.
    """

    def __init__(self, path: Path, columns: Sequence[str] | None = None, first: int = 0) -> None:
        self.path, self.columns, self.first = path, columns, first
        self.rows: list[dict[str, float]] = []
        self.lr, self.started = 0.0, time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        epoch = trainer.current_epoch + self.first
        found = {"epoch": epoch, "lr": self.lr, "seconds": time.monotonic() - self.started, **logged}
        columns = self.columns or ("epoch", "lr", *sorted((name for name in logged if "/" in name), reverse=True))
        self.rows = [row for row in self.rows if row["epoch"] < epoch] + [{name: found[name] for name in columns}]
        if first():
            write_csv(self.path, self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

"""How far an epoch is, in a line that fits a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn, CustomTimeColumn
from rich.progress import TextColumn

SHORT = 10  # characters of the bar itself


class Bar(RichProgressBar):
    """Lightning's bar with epochs counted from 1, metrics by the first or last part of their names, and nothing that
    the reader does not need to wait: it wrapped its metrics over four lines."""

    def configure_columns(self, trainer: L.Trainer) -> list:
        """Epoch, bar, batches, elapsed and remaining time; the metrics follow."""
        style = self.theme
        return [
            TextColumn("[progress.description]{task.description}"),
            CustomBarColumn(
                bar_width=SHORT,
                complete_style=style.progress_bar,
                finished_style=style.progress_bar_finished,
                pulse_style=style.progress_bar_pulse,
            ),
            BatchesProcessedColumn(style=style.batch_progress),
            CustomTimeColumn(style=style.time),
        ]

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """val and loss, of val/relative_l2 and train/loss; a metric of another name keeps it."""
        shown = super().get_metrics(trainer, module)
        shown.pop("v_num", None)
        return {_short(name): value for name, value in shown.items()}

    def _get_train_description(self, current_epoch: int) -> str:
        of = "" if self.trainer.max_epochs is None else f"/{self.trainer.max_epochs}"
        return f"{f'Epoch {current_epoch + 1}{of}':{len(self.validation_description)}}"


def _short(name: str) -> str:
    part, _, metric = name.partition("/")
    return {"val": "val", "train": metric}.get(part, name) if metric else name

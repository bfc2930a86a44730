"""How long a training will take and what it holds in memory, said once it can be known."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from orca_rank.processes import first
from orca_rank.words import duration, size

WARM, ENOUGH = 2, 10  # batches that prepare what the others find ready, and after which a forecast is made


class Forecast(Callback):
    """One line after some batches, where training will take longer than `worth` seconds: time left, epochs, memory.

    Evaluation between the epochs is not in the time. A run that goes on from a checkpoint counts what is left.
    """

    def __init__(self, worth: float = 60.0) -> None:
        self.worth, self.seen, self.began = worth, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seen = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        self.seen += 1
        if self.seen == WARM:
            self.began = time.monotonic()
        if self.seen != ENOUGH or trainer.max_epochs is None or not first():
            return
        each = (time.monotonic() - self.began) / (ENOUGH - WARM)
        batches = int(trainer.num_training_batches)
        left = batches * (trainer.max_epochs - trainer.current_epoch) - batch_index - 1
        if left * each < self.worth:
            return
        bar = trainer.progress_bar_callback
        held = f", {size(held_bytes(module.device))} in memory" if held_bytes(module.device) else ""
        say = print if bar is None else bar.print
        say(f"about {duration(left * each)} of training: {left} batches at {1000 * each:.0f} ms{held}")


def held_bytes(device: torch.device) -> int:
    """The most that this process has held so far: on a GPU what torch has allocated, else resident; 0 if not known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""What a training stage keeps after every epoch, and how it goes on from there."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from torch import Tensor

from orca_rank.artifacts.damaged import DamagedFile, reading
from orca_rank.artifacts.files import atomic
from orca_rank.artifacts.plain import check_sums
from orca_rank.artifacts.unfinished import CHECKPOINTS
from orca_rank.processes import agreed, first

console = Console(highlight=False, markup=False)
LAST, PREVIOUS = CHECKPOINTS


class Keep(Checkpoint):
    """After every epoch last.ckpt, with the one before it as previous.ckpt; in both, the best epoch so far.

    The best epoch's tensors travel in the checkpoint itself, so that a run folder can be moved or copied, and so does
    the patience, so that a run killed after it stopped early does not train on.

    Args:
        folder: for the checkpoints. monitor: the logged value that chooses the best epoch, lower is better; None
            chooses none. patience: stop after so many epochs without a better value. min_delta: by how much a value
            must be lower to be better.
        tensors: what to keep of the best epoch. counts: whether an epoch that ends now may be the best one, and costs
            patience if it is not; None if each may. The last one always does.
    """

    def __init__(
        self,
        folder: Path,
        monitor: str | None = None,
        *,
        patience: int | None = None,
        min_delta: float = 0.0,
        tensors: Callable[[], dict[str, Tensor]] | None = None,
        counts: Callable[[], bool] | None = None,
    ) -> None:
        self.folder, self.monitor, self.patience, self.min_delta = folder, monitor, patience, min_delta
        self.tensors, self.counts = tensors, counts
        self.best: dict[str, Tensor] = {}
        self.value = float("inf")
        self.waited = 0
        self.seconds = 0.0
        self.started = time.perf_counter()

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = self.stopped
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.monitor is not None and (self.counts is None or self.counts() or _is_last(trainer)):
            value = float(trainer.callback_metrics[self.monitor])
            self._judge(agreed(lambda: value))
            trainer.should_stop = trainer.should_stop or self.stopped
        now = time.perf_counter()
        self.seconds, self.started = self.seconds + now - self.started, now
        save(trainer, self.folder)

    def _judge(self, value: float) -> None:
        if value + self.min_delta < self.value:
            self.value, self.waited = value, 0
            if self.tensors is not None:
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.tensors().items()}
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "value": self.value, "waited": self.waited, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)


def _is_last(trainer: L.Trainer) -> bool:
    """Whether no epoch follows the one that ends now."""
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    return trainer.should_stop or 0 < epochs <= trainer.current_epoch + 1 or 0 < steps <= trainer.global_step


def save(trainer: L.Trainer, folder: Path) -> None:
    """last.ckpt, always whole; the one that was there becomes previous.ckpt, and stays last.ckpt until the new one is
    on the disk, so that a stop finds a last.ckpt at any moment. All processes together: the first one writes."""
    last, previous = folder / LAST, folder / PREVIOUS
    if not first():
        trainer.save_checkpoint(last, weights_only=False)  # Lightning wants all to take part, and writes on the first
        return
    with atomic(last) as temporary:
        trainer.save_checkpoint(temporary, weights_only=False)
        # A rename of one link of a file over another does nothing.
        if last.exists() and not (previous.exists() and previous.samefile(last)):
            with atomic(previous) as second:
                second.unlink()
                try:
                    os.link(last, second)
                except OSError:  # a file system without links
                    shutil.copyfile(last, second)


def checkpoint_of(folder: Path) -> Path | None:
    """The checkpoint to go on from; where the last one is damaged, that is said and the one before it is taken."""
    for path in (folder / name for name in CHECKPOINTS):
        if not path.exists():
            continue
        if _whole(path):
            console.print(f"going on from {path}", soft_wrap=True)
            return path
        console.print(f"{path} is damaged and left out", soft_wrap=True)
    return None


def _whole(path: Path) -> bool:
    with contextlib.suppress(DamagedFile), reading(path, "it is left out"):
        check_sums(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        return isinstance(found, dict) and {"state_dict", "loops", "callbacks", "optimizer_states"} <= found.keys()
    return False


def fit(trainer: L.Trainer, module: L.LightningModule, checkpoint: Path | None, **data: Any) -> None:
    """Trainer.fit, from a checkpoint where there is one; only tensors and plain values are read from it.

    Raises:
        KeyboardInterrupt: see `interrupts`.
    """
    with interrupts(), warnings.catch_warnings():
        # Batch normalisation is kept in evaluation mode on purpose, see `backbone.embedder`.
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
        trainer.fit(module, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True, **data)


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Ctrl-C and SIGTERM during a Trainer's work as a KeyboardInterrupt, with the signal's number for SIGTERM.

    Lightning would exit by itself, after SIGTERM with status 0 as if it had finished.
    """
    try:
        yield
    except SIGTERMException:
        raise KeyboardInterrupt(signal.SIGTERM) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise

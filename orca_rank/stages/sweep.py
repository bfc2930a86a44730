"""What a sweep leaves and says as its points finish: summary.csv, and how much is left."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from orca_rank.artifacts.files import read_record, write_csv
from orca_rank.artifacts.lock import locked
from orca_rank.report.results import Tune
from orca_rank.report.run_folder import RunFolder, read_tunes
from orca_rank.report.tables import means, summary
from orca_rank.stages.setup import stage_folder
from orca_rank.words import duration

EACH = 5e-4  # seconds that it takes to read a fine-tune, about
FREE, SHARE = 1.0, 20  # seconds that a summary may take after every point; of more, one part of the time in so many


def write_tables(path: Path, tunes: Sequence[Tune]) -> None:
    """Write a run folder's summary.csv and means.csv; none where it would be empty."""
    for name, rows in (("summary.csv", summary(tunes)), ("means.csv", means(tunes))):
        if rows:
            write_csv(path / name, rows)
        else:
            (path / name).unlink(missing_ok=True)


def grow(path: Path, *, last: bool) -> None:
    """Bring a run folder's summary.csv and means.csv up to date after a point of a sweep.

    Thousands of fine-tunes take seconds to read: then not after every point, but after the last. Nothing is written
    while another process writes, or where a file of the folder is damaged, which `stage=report` says.
    """
    written, tunes = path / "summary.csv", path / "finetune"
    if not tunes.is_dir():
        return
    cost = EACH * sum(1 for _ in tunes.iterdir())
    if not last and cost > FREE and written.exists() and time.time() - written.stat().st_mtime < SHARE * cost:
        return
    with contextlib.suppress(BlockingIOError, ValueError), locked(path / "report"):
        write_tables(path, read_tunes(RunFolder(path, "")).tunes)


def objective(config: DictConfig) -> float | None:
    """The validation metric of the configured fine-tune, which is lower where it is better; None if it has not run."""
    finetune = importlib.import_module("orca_rank.stages.finetune")  # here, because lightning takes seconds
    path = stage_folder(config, "finetune") / finetune.tag(config) / "metrics.json"
    if not path.exists():
        return None
    return read_record(path, "stage=finetune", lambda payload: float(payload[f"val/{payload['metric']}"]))


class Progress:
    """How far a sweep is that runs its points one after the other.

    Args:
        total: number of points; None where the sweeper alone knows. times: seconds that the points before took.
    """

    RECENT = 10  # points whose mean time is expected of the others: those that were done before take none

    def __init__(self, total: int | None, times: Sequence[float]) -> None:
        self.total, self.times = total, times

    @property
    def last(self) -> bool:
        """Whether the point that runs now is the last."""
        return self.total is not None and len(self.times) + 1 >= self.total

    def words(self) -> str:
        """Of the point that begins: its number, and how long the rest may take."""
        number = f"point {len(self.times) + 1}" + (f" of {self.total}" if self.total is not None else "")
        recent = self.times[-self.RECENT :]
        if self.total is None or not recent:
            return number
        left = (self.total - len(self.times)) * sum(recent) / len(recent)
        return f"{number}, about {duration(left)} left"

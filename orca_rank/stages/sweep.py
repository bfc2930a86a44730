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
    path = Path(config.paths.runs) / str(config.run) / "finetune" / finetune.tag(config) / "metrics.json"
    if not path.exists():
        return None
    return read_record(path, "stage=finetune", lambda payload: float(payload[f"val/{payload['metric']}"]))


class Progress:
    """How far a sweep is, whose points run one after the other or beside each other.

    Args:
        total: number of points; None where the sweeper alone knows. moments: when the first began and when points
            ended, in seconds.
    """

    RECENT = 10  # points whose pace is expected of the others: those that were done before take no time

    def __init__(self, total: int | None, moments: Sequence[float]) -> None:
        self.total, self.moments, self.ended = total, moments, max(0, len(moments) - 1)

    @property
    def over(self) -> bool:
        """Whether all points have ended."""
        return self.total is not None and self.ended >= self.total

    def next(self) -> str:
        """The number of the point that begins when those before have ended, and how long the rest may take."""
        return f"point {self.ended + 1}{self._of()}{self._left()}"

    def done(self) -> str:
        """How many points have ended, and how long the rest may take."""
        return f"{self.ended}{self._of()} points done{self._left()}"

    def _of(self) -> str:
        return "" if self.total is None else f" of {self.total}"

    def _left(self) -> str:
        recent = self.moments[-self.RECENT - 1 :]
        if self.total is None or self.over or len(recent) < 2:
            return ""
        pace = (recent[-1] - recent[0]) / (len(recent) - 1)
        return f", about {duration((self.total - self.ended) * pace)} left"


class Turn:
    """The turn of one point of a sweep among the others.

    Args:
        run: the run folder. total: points of the sweep, if it is known. moments: when the sweep's first point began and
            when points ended, for the points of one process; the point adds its own. shared: the file in which they
            stand instead, where points run in processes of their own; the last one takes it away.
    """

    def __init__(self, run: Path, total: int | None, moments: list[float], shared: Path | None) -> None:
        self.run, self.total, self.moments, self.shared = run, total, moments, shared
        if shared is not None:
            shared.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError), open(shared, "x") as stream:
                stream.write(f"{time.time()}\n")
        elif not moments:
            moments.append(time.time())

    def begins(self) -> str:
        """See `Progress.next`."""
        return Progress(self.total, self.moments).next()

    def ends(self) -> str:
        """Bring the sweep's summary up to date; see `Progress.done`."""
        if self.shared is None:
            self.moments.append(time.time())
        else:
            with open(self.shared, "a+") as stream:  # at hand, whoever takes it away
                stream.write(f"{time.time()}\n")
                stream.flush()
                stream.seek(0)
                self.moments[:] = map(float, stream.read().splitlines())
        progress = Progress(self.total, self.moments)
        grow(self.run, last=progress.over)
        if progress.over and self.shared is not None:
            self.shared.unlink(missing_ok=True)
        return progress.done()

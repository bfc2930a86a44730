"""`logger=tensorboard` and `logger=mlflow`: Lightning's loggers, told which stage of which run they are of."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from orca_rank.tracking.page import Job


def tensorboard(save_dir: str, job: Job | None = None, **options: Any) -> TensorBoardLogger:
    """Event files in the stage's folder; `tensorboard --logdir <paths.runs>` shows those of all runs.

    Args:
        save_dir: the log folder of a stage. job: whose it is. options: of Lightning's TensorBoardLogger.

    Raises:
        ValueError: without the package tensorboard.
    """
    check_package("tensorboard")
    return TensorBoardLogger(save_dir, **{"name": "", "version": "", **options})


class MLflow(MLFlowLogger):
    """A run of MLflow for every stage, named as the stage or fine-tune is and tagged with the run folder's name.

    A resumed stage goes on with its run, whose id is kept in the stage's log folder.

    Args:
        save_dir: the log folder of a stage. job: whose it is. options: of Lightning's MLFlowLogger.

    Raises:
        ValueError: without the package mlflow.
    """

    def __init__(self, save_dir: str, job: Job | None = None, **options: Any) -> None:
        check_package("mlflow")
        self.kept = Path(save_dir) / "mlflow-id"
        if job is not None:
            options = {"run_name": job.name, "tags": {"run": job.run, "stage": job.stage}, **options}
        if self.kept.exists():
            options = {"run_id": self.kept.read_text(), **options}
        super().__init__(**options)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        client = super().experiment
        if not self.kept.exists():
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            self.kept.write_text(str(self._run_id))
        return client


def check_package(logger: str) -> None:
    """Raise a ValueError where the package that a logger needs is not installed.

    Args:
        logger: tensorboard or mlflow, in any case.
    """
    package = logger.lower()
    if importlib.util.find_spec(package) is None:
        raise ValueError(f'logger={package} needs the package {package}: pip install "orca_rank[{package}]"')

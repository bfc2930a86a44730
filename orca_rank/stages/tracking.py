"""What the stages tell a tracking service beside their learning curves: each its page, once its files are written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from orca_rank.artifacts.command import swept
from orca_rank.artifacts.provenance import plain
from orca_rank.processes import first
from orca_rank.stages.trainer import logger_for
from orca_rank.task import Task
from orca_rank.tracking.page import Job, Page

if TYPE_CHECKING:
    import lightning as L

    from orca_rank.data import Data

SHOWS = "orca_rank.training.wandb_run.WandB"  # the logger that shows pages; named, because W&B takes a second to import


def job_of(config: DictConfig, stage: str, folder: Path, tag: str = "") -> Job:
    """Whose page a logger writes.

    Args:
        folder: of the stage. tag: of a fine-tune.
    """
    return Job(str(config.run), stage, folder, tag, swept())


def predictions_of(folder: Path, task: Task, data: Data, trust: Collection[str]) -> dict[str, bytes]:
    """A picture of the fields of a fine-tune's first test samples; none of other tasks.

    Args:
        folder: of the fine-tune. data: ready to test. trust: further targets that its files may name.
    """
    if task.kind != "dense":
        return {}
    from orca_rank.report.prediction_figures import fields_image
    from orca_rank.stages.gallery import predictions

    return {"predictions": fields_image(predictions(folder.parent.parent, folder.name, data, trust))}


def show_in(trainer: L.Trainer, page: Callable[[], Page]) -> None:
    """Add the page to the tracked run of a stage that trains, where its logger shows pages."""
    for logger in trainer.loggers:
        if first() and hasattr(logger, "show"):
            logger.show(page())


def show(
    config: DictConfig,
    stage: str,
    folder: Path,
    made_from: Mapping[str, Any],
    page: Callable[[], Page],
    tag: str = "",
) -> None:
    """A tracked run for a stage that trains nothing, where the configured logger shows pages.

    Args:
        folder: of the stage. made_from: the options that its files depend on. tag: of the fine-tune it is about.
    """
    if not config.logger or config.logger["_target_"] != SHOWS or not first():
        return
    logger, failed = logger_for(config.logger, folder, job_of(config, stage, folder, tag)), True
    try:
        logger.log_hyperparams(plain(made_from))
        logger.show(page())
        failed = False
    finally:
        logger.close(failed)


def shown(folder: Path) -> bool:
    """Whether a stage's folder has a page already."""
    return (folder / "log" / "wandb-id").exists()

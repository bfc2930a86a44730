"""stage=dashboard: the workspace of W&B in which the pages of a run stand together, as code."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from orca_rank.artifacts.command import command
from orca_rank.artifacts.files import write_json
from orca_rank.stages.tracking import SHOWS

console = Console(highlight=False, markup=False)
TEST, VAL, TRAINED = "test", "val", "trainable/total"  # of `tracking.pages.finetune_page`
VARIED = ("adapter", "rule", "mean_rank", "lr", "seed")  # columns that tell fine-tunes apart


def run(config: DictConfig) -> None:
    """Write <run>/dashboard.json, the workspace as W&B takes it, and with logger.offline=false save it there.

    Saving again makes a further workspace of the same name.

    Raises:
        ValueError: without logger=wandb, the package wandb-workspaces or, to save it, an entity.
    """
    logger = config.logger
    if not logger or logger["_target_"] != SHOWS:
        raise ValueError("stage=dashboard arranges pages of W&B: add logger=wandb with the project they are in")
    if not logger.offline and logger.entity is None:
        raise ValueError("logger.offline=false: to save a workspace name its owner, logger.entity=<user or team>")
    made = workspace(str(logger.group or config.run), str(logger.project), str(logger.entity or "me"))
    path = Path(config.paths.runs) / str(config.run) / "dashboard.json"
    write_json(path, made._to_model().model_dump(by_alias=True, exclude_none=True, mode="json"))
    if logger.offline:
        console.print(
            f"written to {path}; to save it at W&B: `"
            f"{command('stage=dashboard', 'logger=wandb', 'logger.offline=false', 'logger.entity=YOURS')}`",
            soft_wrap=True,
        )
        return
    made.save()
    console.print(f"saved: {made.url}", soft_wrap=True)


def workspace(run: str, project: str, entity: str) -> Any:
    """The fine-tunes of a run against what was varied, their curves, the alignment, and the tables of layers.

    Args:
        run: the group of the pages. project, entity: where they are.

    Raises:
        ValueError: without the package wandb-workspaces.
    """
    try:
        expr, panels, ws = (
            importlib.import_module(f"wandb_workspaces.{name}") for name in ("expr", "reports.v2", "workspaces")
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            'stage=dashboard needs the package wandb-workspaces: pip install "orca_rank[dashboard]"'
        ) from error

    def summary(name: str) -> Any:
        return panels.SummaryMetric(name)

    columns = [panels.ParallelCoordinatesPlotColumn(panels.Config(name), log=name == "lr") for name in VARIED]
    columns += [panels.ParallelCoordinatesPlotColumn(summary(name)) for name in (TRAINED, TEST)]
    results = ws.Section(
        name="Fine-tunes",
        is_open=True,
        panels=[
            panels.ScatterPlot(title="test error, parameters", x=summary(TRAINED), y=summary(TEST), log_x=True),
            panels.BarPlot(
                title="test error by rule, mean over seeds",
                metrics=[summary(TEST)],
                groupby=panels.Config("rule"),
                groupby_aggfunc="mean",
                groupby_rangefunc="stderr",
            ),
            panels.ParallelCoordinatesPlot(title="what was varied", columns=columns),
            panels.ParameterImportancePlot(with_respect_to=TEST),
        ],
    )
    step = "trainer/global_step"
    curves = ws.Section(
        name="Learning curves",
        is_open=True,
        panels=[
            panels.LinePlot(title="validation", x=step, metric_regex="^val/"),
            panels.LinePlot(title="training", x=step, metric_regex="^train/"),
            panels.LinePlot(title="learning rates", x=step, metric_regex="^lr"),
            panels.LinePlot(title="alignment", x=step, y=["loss"]),
        ],
    )
    names = ("layers", "rank_curve", "evidence", "claims", "distances", "summary")
    tables = ws.Section(name="Tables", panels=[panels.WeavePanelSummaryTable(table_name=name) for name in names])
    pictures = ws.Section(name="Pictures", panels=[panels.MediaBrowser(media_keys=["predictions"])])
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"orca_rank {run}",
        sections=[results, curves, tables, pictures],
        runset_settings=ws.RunsetSettings(
            filters=[expr.Metric("Group") == run],
            groupby=[expr.Config("stage")],
            order=[expr.Ordering(expr.Summary(TEST), ascending=True)],
            pinned_columns=[f"summary:{TEST}", f"summary:{VAL}", *(f"config:{name}" for name in VARIED)],
        ),
    )

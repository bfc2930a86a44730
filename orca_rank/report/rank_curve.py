"""One nested fine-tune at every rank, beside separate fine-tunes: figure and section."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from orca_rank.artifacts.damaged import reading
from orca_rank.report.canvas import COLOURS, INK, LETTER, grid, styled, words
from orca_rank.report.page import Page, cell
from orca_rank.report.results import Tune
from orca_rank.task import Task

NAME = "rank_curve"
TRAINED_ALONE = "LoRA trained at that rank alone"
Rows = Sequence[Mapping[str, float]]


def separate_runs(tunes: Sequence[Tune], task: Task) -> list[tuple[int, float]]:
    """(rank, test metric) of the fine-tunes with plain LoRA of one rank in all layers, on the task's metric."""
    found = []
    for tune in tunes:
        ranks = set() if tune.plan is None else set(tune.plan.ranks.values())
        if len(ranks) == 1 and tune.option("adapter.name") == "lora" and tune.metric == task.metric_name:
            found.append((ranks.pop(), tune.test))
    return sorted(found)


@styled()
def nested_figure(curves: Mapping[str, Rows], separate: Sequence[tuple[int, float]], task: Task) -> Figure:
    """Test metric against rank: a line for every nested fine-tune, a ring for every separate one.

    Args:
        curves: tag -> rows of rank_curve.csv. separate: see `separate_runs`.
    """
    longest = max(len(name) for name in (*curves, TRAINED_ALONE))
    figure, ((axis,),) = grid([5.2], [3.0], left=0.9, right=0.6 + LETTER * longest)  # the legend stands beside
    for (tag, rows), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        axis.plot([row["rank"] for row in rows], [row["test"] for row in rows], "o-", color=colour, label=tag, ms=4)
    if separate:
        ranks, errors = zip(*separate, strict=True)
        axis.plot(ranks, errors, "o", color=INK, mfc="none", markersize=8, label=TRAINED_ALONE)
    axis.set_xscale("log", base=2)
    shown = sorted({int(row["rank"]) for rows in curves.values() for row in rows} | {rank for rank, _ in separate})
    ticks = [rank for rank in shown if rank & (rank - 1) == 0]
    axis.set(xlabel="rank of every layer", ylabel=f"test {words(task.metric_name)}", xticks=ticks, xticklabels=ticks)
    axis.minorticks_off()
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def nested_curves(page: Page, tunes: Sequence[Tune]) -> None:
    """The section on the rank curves that stage=rank_curve has written, by task; nothing where there is none.

    Raises:
        DamagedFile: if one cannot be read.
    """
    groups: dict[str, dict[str, Rows]] = {}
    for tune in tunes:
        path = tune.folder / f"{NAME}.csv"
        if path.exists():
            with reading(path, "run stage=rank_curve again"), open(path, newline="") as stream:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
                rows = [{name: row[name] for name in ("rank", "parameters", "val", "test")} for row in rows]
            groups.setdefault(tune.metric, {})[tune.tag] = rows
    if not groups:
        return
    page.section(NAME, "Every rank of one adapter")
    for metric, curves in groups.items():
        task = next(tune.task for tune in tunes if tune.metric == metric)
        best = {tag: min(rows, key=lambda row: row["val"]) for tag, rows in curves.items()}
        said = "; ".join(
            f"{tag}: rank {row['rank']:.0f} has the lowest validation {words(metric)}, test {cell(row['test'])}"
            for tag, row in best.items()
        )
        page.figure(
            f"{NAME}_{metric}",
            nested_figure(curves, separate_runs(tunes, task), task),
            f"Test {words(metric)} of one fine-tune cut to every rank, without further training. {said}.",
        )

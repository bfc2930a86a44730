"""One nested fine-tune at every rank, beside separate fine-tunes: figure and section."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence

from orca_rank.artifacts.damaged import reading
from orca_rank.artifacts.provenance import IGNORED_KEYS
from orca_rank.report.draw import COLOURS, Panel, Picture, scale, words
from orca_rank.report.page import Page, cell
from orca_rank.report.results import Tune
from orca_rank.task import Task

NAME = "rank_curve"
TRAINED_ALONE = "LoRA trained at that rank alone, best on validation"
# Options in which a separate fine-tune is as the nested one: all of these sections, and how long it trains.
_SAME = ("data.", "contents.data", "contents.backbone", "backbone.", "layers.", "embedder.", "predictor.")
Rows = Sequence[Mapping[str, float]]


def separate_runs(tunes: Sequence[Tune], nested: Sequence[Tune]) -> list[tuple[int, float]]:
    """(rank, test metric) of plain LoRA of one rank in all layers, with data, model and epochs of a nested fine-tune.

    Of those with one rank and seed, which differ in learning rate, scale or the like, the one with the lowest
    validation metric stands for all.
    """
    wanted = [_same(tune) for tune in nested]
    best: dict[tuple[int, object], Tune] = {}
    for tune in tunes:
        ranks = set() if tune.plan is None else set(tune.plan.ranks.values())
        if len(ranks) != 1 or tune.option("adapter.name") != "lora" or _same(tune) not in wanted:
            continue
        place = ranks.pop(), tune.option("seed")
        if place not in best or tune.val < best[place].val:
            best[place] = tune
    return sorted((rank, tune.test) for (rank, _), tune in best.items())


def _same(tune: Tune) -> dict[str, object]:
    """What a separate fine-tune has to share with the nested one."""
    left_out = IGNORED_KEYS | {"seed"}  # of the order of the batches
    found = {
        name: value
        for name, value in tune.options.items()
        if name.startswith(_SAME) and name.rpartition(".")[2] not in left_out
    }
    return {**found, "epochs": tune.option("finetune.epochs"), "metric": tune.metric}


def nested_picture(curves: Mapping[str, Rows], separate: Sequence[tuple[int, float]], task: Task) -> Picture:
    """Test metric against rank: a line for every nested fine-tune, a ring for every separate one.

    Args:
        curves: tag -> rows of rank_curve.csv. separate: see `separate_runs`.
    """
    draw = Picture(640, 330 + 18 * (len(curves) + 1))
    ranks = sorted({int(row["rank"]) for rows in curves.values() for row in rows} | {rank for rank, _ in separate})
    values = [row["test"] for rows in curves.values() for row in rows] + [error for _, error in separate]
    panel = Panel(draw, scale(ranks, 75, 620, wide=2), scale(values, 260, 24))
    panel.frame(
        x="rank of every layer",
        y=f"test {words(task.metric_name)}",
        x_ticks=[(r, str(r)) for r in ranks if r & (r - 1) == 0],
    )
    for number, (tag, rows) in enumerate(curves.items()):
        colour = f"c{number % COLOURS}"
        panel.line([(row["rank"], row["test"]) for row in rows], colour)
        for row in rows:
            panel.mark(
                row["rank"], row["test"], f"dot {colour}", f"{tag}, rank {row['rank']:.0f}: {row['test']:.4g}", size=3
            )
        draw.legend(70, 322 + 18 * number, [("-", colour, tag)])
    for rank, error in separate:
        panel.mark(rank, error, "ring c6", f"{TRAINED_ALONE}, {rank}: {error:.4g}", size=5.5)
    if separate:
        draw.legend(70, 322 + 18 * len(curves), [("o", "ring c6", TRAINED_ALONE)])
    return draw


def nested_curves(page: Page, tunes: Sequence[Tune]) -> None:
    """The section on the rank curves that stage=rank_curve has written, by task; nothing where there is none.

    Raises:
        DamagedFile: if one cannot be read.
    """
    groups: dict[str, dict[str, Rows]] = {}
    nested: dict[str, list[Tune]] = {}
    for tune in tunes:
        path = tune.folder / f"{NAME}.csv"
        if path.exists():
            with reading(path, "run stage=rank_curve again"), open(path, newline="") as stream:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
                rows = [{name: row[name] for name in ("rank", "parameters", "val", "test")} for row in rows]
            groups.setdefault(tune.metric, {})[tune.tag] = rows
            nested.setdefault(tune.metric, []).append(tune)
    if not groups:
        return
    page.section(NAME, "Every rank of one adapter")
    for metric, curves in groups.items():
        separate = separate_runs(tunes, nested[metric])
        best = {tag: min(rows, key=lambda row: row["val"]) for tag, rows in curves.items()}
        said = "; ".join(
            f"{tag}: rank {row['rank']:.0f} has the lowest validation {words(metric)}, test {cell(row['test'])}"
            for tag, row in best.items()
        )
        rings = (
            " Rings: LoRA trained at that rank alone with the same data, model and epochs; of the runs with one rank "
            "and seed, which may differ in learning rate or scale, the one with the lowest validation metric."
        )
        page.figure(
            f"{NAME}_{metric}",
            nested_picture(curves, separate, nested[metric][0].task),
            f"Test {words(metric)} of one fine-tune cut to every rank, without further training. {said}."
            f"{rings if separate else ''}",
            [{"fine-tune": tag, **row} for tag, rows in curves.items() for row in rows],
        )

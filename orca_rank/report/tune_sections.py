"""The report's sections on fine-tunes: tables, means over seeds, differences to uniform ranks, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orca_rank.evidence.compare import Estimate
from orca_rank.report.canvas import words
from orca_rank.report.figures import NUMBERED, Gallery, Point, comparison_figure, learning_curves
from orca_rank.report.page import Page, cell
from orca_rank.report.prediction_figures import caption, prediction_figure
from orca_rank.report.results import Interval, Tune
from orca_rank.report.sections import interval_text
from orca_rank.report.tables import Group, Row, differing, groups

_ROWS = 300  # fine-tunes in the page's table; summary.csv has all
_CURVES = 60


def finetunes(page: Page, tunes: Sequence[Tune], baselines: Mapping[str, float]) -> None:
    """Every fine-tune, by metric.

    Args:
        tunes: best validation first within each metric. baselines: name -> relative L2 error of another method.
    """
    if not tunes:
        return
    page.section("finetunes", "Fine-tunes")
    for metric in dict.fromkeys(tune.metric for tune in tunes):
        _finetunes(
            page, [tune for tune in tunes if tune.metric == metric], baselines if metric == "relative_l2" else {}
        )


def _finetunes(page: Page, tunes: Sequence[Tune], baselines: Mapping[str, float]) -> None:
    best, metric, unit = tunes[0], tunes[0].metric, tunes[0].task.metric_unit
    called = words(metric)
    extra, several = differing(tunes), len({tune.run for tune in tunes}) > 1
    more = f"; the first {_ROWS} of {len(tunes)}, all are in summary.csv" if len(tunes) > _ROWS else ""
    page.table(
        [_row(number, tune, extra, several) for number, tune in enumerate(tunes[:_ROWS], 1)],
        f"Sorted by validation {called} ({unit}; lower is better){more}",
    )
    found = groups(tunes)
    seeded = len(found) < len(tunes)
    if seeded or any(group.difference is not None for group in found):
        page.table([means_row(number, group, called) for number, group in enumerate(found[:_ROWS], 1)], MEANS)
    if any(name.startswith("data.") for name in extra):
        baselines = {}  # of one data set among several
    lines = "".join(f" {name[0].upper()}{name[1:]}: {cell(value)}." for name, value in baselines.items())
    seeds = len({tune.option("seed") for tune in tunes})
    points = [_mean(group) for group in found] if seeded else [_point(tune) for tune in tunes]
    marks = "; means over seeds with their 95 % intervals" if seeded else ""
    marks += f", numbered as in the table{' of means' if seeded else ''}" if len(points) <= NUMBERED else ""
    page.figure(
        f"comparison_{metric}",
        comparison_figure(points, metric, unit, baselines),
        f"Test {called} against trainable parameters{marks}. The best validation {called}, "
        f"{cell(best.val)}, is {best.tag}'s; its test {called} is {cell(best.test)}.{lines} "
        f"{'One seed: the spread between seeds is not known' if seeds == 1 else f'{seeds} seeds'}.",
    )
    curves = {f"{tune.run}/{tune.tag}" if several else tune.tag: tune.curve for tune in tunes[:_CURVES] if tune.curve}
    if curves:
        fewer = f" The best {_CURVES} of {len(tunes)}." if len(tunes) > _CURVES else ""
        page.figure(
            f"curves_{metric}",
            learning_curves(curves, metric, unit),
            f"Training loss and validation {called} by epoch.{fewer} Each fine-tune is tested at its best validation "
            f"epoch.",
        )


def predictions(page: Page, tag: str, gallery: Gallery) -> None:
    """Test samples as the fine-tune `tag` predicts them."""
    page.section("predictions", "Predictions")
    page.figure("predictions", prediction_figure(gallery), caption(gallery, tag))


MEANS = (
    "Means over seeds, in brackets 95 % intervals of Student's t. Difference to uniform: in per cent of uniform's "
    "error, paired by seed, at the same other options and as many adapter parameters (within 5 %); negative is better"
)


def means_row(number: int, group: Group, called: str) -> Row:
    """A group of fine-tunes as a row of the table of means."""
    difference = group.difference
    return {
        "#": number,
        "adapter": group.first.option("adapter.name"),
        "rule": group.first.rule,
        "budget": group.first.budget,
        **_options(group.values),
        "seeds": len(group.tunes),
        "adapter parameters": round(group.parameters),
        f"test {called}": _with_interval(group.test),
        "difference to uniform (%)": "" if difference is None else _with_interval(difference),
        "pairs": "" if difference is None else difference.runs,
    }


def _row(number: int, tune: Tune, extra: Sequence[str], several: bool) -> dict[str, Any]:
    called = words(tune.metric)
    return {
        "#": number,
        **({"run": tune.run} if several else {}),
        "tag": tune.tag,
        "adapter": tune.option("adapter.name"),
        "rule": tune.rule,
        "budget": tune.budget,
        "seed": tune.option("seed"),
        **_options({name: tune.option(name) for name in extra}),
        "trainable": tune.counts.trained,
        f"val {called}": tune.val,
        f"test {called}": tune.test,
        "epochs": tune.epochs,
        "seconds": tune.seconds,
    }


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options under the last part of their name, where no other column has it; classes without their module."""
    last = [name.removesuffix("._target_").rpartition(".")[2] for name in values]
    return {
        short if last.count(short) == 1 and short not in _COLUMNS else name: _value(name, value)
        for short, (name, value) in zip(last, values.items(), strict=True)
    }


_COLUMNS = ("tag", "adapter", "rule", "budget", "seed", "seeds", "epochs", "seconds", "run", "pairs")


def _value(name: str, value: Any) -> Any:
    return str(value).rpartition(".")[2] if name.endswith("._target_") else value


def _point(tune: Tune) -> Point:
    kind = str(tune.option("adapter.name"))
    return Point(tune.tag, kind, tune.counts.trained, Interval(tune.test))


def _mean(group: Group) -> Point:
    trained = sum(tune.counts.trained for tune in group.tunes) / len(group.tunes)
    varying = [f"{name}={value}" for name, value in _options(group.values).items() if value != ""]
    named = (str(group.first.option("adapter.name")), group.first.rule, group.first.budget, *varying)
    low, high = _ends(group.test)
    return Point(" ".join(part for part in named if part), named[0], trained, Interval(group.test.mean, low, high))


def _with_interval(estimate: Estimate) -> str:
    return cell(estimate.mean) + interval_text(*_ends(estimate))


def _ends(estimate: Estimate) -> tuple[float | None, float | None]:
    low, high = estimate.interval()
    return (low, high) if math.isfinite(low) else (None, None)

"""The report's sections on fine-tunes: against each other in a figure and tables, and their curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orca_rank.evidence.compare import Estimate
from orca_rank.report.draw import words
from orca_rank.report.figures import NUMBERED, Point, comparison_figure, learning_curves
from orca_rank.report.page import Page, cell
from orca_rank.report.prediction_figures import Gallery, caption, prediction_figure, prediction_rows
from orca_rank.report.results import Interval, Tune
from orca_rank.report.tables import Group, Row, differing, groups
from orca_rank.report.values import budget_words, counted, interval_text

_ROWS = 300  # fine-tunes in the page's table; summary.csv has all
_SHOWN = 12  # rows of a table of fine-tunes that are shown where means stand above it; more are folded
_CURVES = 60
ENDS = {"full": "full fine-tuning", "probe": "frozen body"}  # by adapter.method: the two ends of every adapter


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
    metric, unit, found, extra = tunes[0].metric, tunes[0].task.metric_unit, groups(tunes), differing(tunes)
    called, several = words(metric), len({tune.run for tune in tunes}) > 1
    if any(name.startswith("data.") for name in extra):
        baselines = {}  # of one data set among several
    _comparison(page, tunes, found, baselines)
    seeded = len(found) < len(tunes)
    with_means = seeded or any(group.difference is not None for group in found)
    if with_means:
        rows = [means_row(number, group, called) for number, group in enumerate(found[:_ROWS], 1)]
        page.table(rows, MEANS + (DIFFERENCES if any(row["pairs"] for row in rows) else ""), keys=2)
    more = f"; the first {_ROWS} of {len(tunes)}, all are in summary.csv" if len(tunes) > _ROWS else ""
    page.table(
        [_row(number, tune, extra, several) for number, tune in enumerate(tunes[:_ROWS], 1)],
        f"Sorted by validation {called} ({unit}; lower is better){more}",
        folded="Every fine-tune" if with_means and len(tunes) > _SHOWN else "",
        keys=2,
    )
    curves = {f"{tune.run}/{tune.tag}" if several else tune.tag: tune.curve for tune in tunes[:_CURVES] if tune.curve}
    if not curves:
        return
    fewer = f" The best {_CURVES} of {len(tunes)}." if len(tunes) > _CURVES else ""
    with page.fold(f"Training loss and validation {called} by epoch"):
        page.figure(
            f"curves_{metric}",
            learning_curves(curves, metric, unit),
            f"Training loss and validation {called} by epoch.{fewer} Each fine-tune is tested at its best validation "
            f"epoch.",
            [{"fine-tune": name, **row} for name, rows in curves.items() for row in rows],
        )


def _comparison(page: Page, tunes: Sequence[Tune], found: Sequence[Group], baselines: Mapping[str, float]) -> None:
    """The figure of test metric against parameters; nothing where there is nothing to compare."""
    metric, unit, best = tunes[0].metric, tunes[0].task.metric_unit, tunes[0]
    lines = ends(found) | {name: Interval(value) for name, value in baselines.items()}
    drawn = [
        (number, group) for number, group in enumerate(found, 1) if group.first.option("adapter.method") not in ENDS
    ]
    rest = {tune.counts.trained - tune.counts.parts["adapter"] for _, group in drawn for tune in group.tunes}
    only_adapter = len(rest) == 1 and all(group.parameters > 0 for _, group in drawn)
    if not drawn or len(drawn) + len(lines) < 2:
        return
    points = [_point(number, group, only_adapter) for number, group in drawn]
    counted = "trainable parameters" + (" of the adapter" if only_adapter else "")
    beside = f" All of them also train {cell(rest.pop())} others." if only_adapter and max(rest) else ""
    seeds = len({tune.option("seed") for tune in tunes})
    seeded = any(len(group.tunes) > 1 for group in found)
    marks = "; a small point a seed, a ring their mean with its 95 % interval" if seeded else ""
    marks += (
        f", numbered as in the table{' of means' if len(found) < len(tunes) else ''}" if len(points) <= NUMBERED else ""
    )
    sizes = {point.parameters for point in points}
    against = f"against {counted}" if len(sizes) > 1 else f"of fine-tunes with {cell(round(sizes.pop()))} {counted}"
    called = words(metric)
    rows: list[Row] = [{"name": p.name, "parameters": p.parameters, "test": value} for p in points for value in p.seeds]
    page.figure(
        f"comparison_{metric}",
        comparison_figure(points, lines, metric, unit, counted),
        f"Test {called} {against}{marks}. The best validation {called}, "
        f"{cell(best.val)}, is {best.tag}'s; its test {called} is {cell(best.test)}.{beside} "
        f"{'One seed: the spread between seeds is not known' if seeds == 1 else f'{seeds} seeds'}.",
        [*rows, *({"name": name, "test": one.value} for name, one in lines.items())],
    )


def ends(found: Sequence[Group]) -> dict[str, Interval]:
    """Test metric of full fine-tuning and of the frozen body, each the group of it that is best on validation."""
    lines = {}
    for method, name in ENDS.items():
        own = [group for group in found if group.first.option("adapter.method") == method]
        if own:
            best = min(own, key=lambda group: sum(tune.val for tune in group.tunes) / len(group.tunes))
            lines[name] = interval_of(best.test)
    return lines


def interval_of(estimate: Estimate) -> Interval:
    return Interval(estimate.mean, *_ends(estimate))


def described(tune: Tune) -> str:
    """A fine-tune in words: what is trained, with which ranks, at which budget."""
    end = ENDS.get(str(tune.option("adapter.method")))
    if end:
        return end
    name = str(tune.option("adapter.name"))
    ranks = f"{tune.rule} ranks" + (f" ({budget_words(tune.budget)})" if tune.budget else "") if tune.rule else ""
    return " with ".join(part for part in ("LoRA" if name == "lora" else words(name), ranks) if part)


def predictions(page: Page, tune: Tune, gallery: Gallery) -> None:
    """Test samples as a fine-tune predicts them."""
    page.section("predictions", "Predictions")
    page.figure("predictions", prediction_figure(gallery), caption(gallery, tune.tag), prediction_rows(gallery))


MEANS = "Means over seeds, in brackets 95 % intervals of Student's t"
DIFFERENCES = (
    ". Difference to uniform: in per cent of uniform's error, paired by seed, at the same other options and as many "
    "adapter parameters (within 5 %); negative is better"
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
        "epochs": group.first.epochs,
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


def _point(number: int, group: Group, only_adapter: bool) -> Point:
    trained = sum(tune.counts.trained for tune in group.tunes) / len(group.tunes)
    varying = [f"{name} {value}" for name, value in _options(group.values).items() if value != ""]
    name = ", ".join([described(group.first), *varying, counted(group.first.epochs, "epoch")])
    return Point(
        name,
        str(group.first.option("adapter.name")),
        group.parameters if only_adapter else trained,
        interval_of(group.test),
        tuple(tune.test for tune in group.tunes),
        number,
    )


def _with_interval(estimate: Estimate) -> str:
    return cell(estimate.mean) + interval_text(*_ends(estimate))


def _ends(estimate: Estimate) -> tuple[float | None, float | None]:
    low, high = estimate.interval()
    return (low, high) if math.isfinite(low) else (None, None)

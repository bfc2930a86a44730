"""Figures for a notebook, a paper or a README, by matplotlib; the page has its own (`draw`).

Figures are made without pyplot, so there is no global state and nothing to close. Every axes has its place in inches
(`grid`): matplotlib's searches for a layout cost more than drawing.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orca_rank.evidence.points import FROZEN, FULL
from orca_rank.measuring.records import Gap, Layer
from orca_rank.report.draw import Number, words
from orca_rank.report.layer_figures import SIGNIFICANT, Place, places, significant
from orca_rank.report.rank_curve import TRAINED_ALONE, Rows
from orca_rank.task import Task

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, INK = "#8a8f98", "#24292f"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
STYLE: dict[Any, Any] = {  # matplotlib types its names one by one
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titley": 1.0,  # not searched for
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
PAGE = 10.9  # inches, what fits the page without scrolling
PIXELS = 144  # per inch; the page shows an inch as 96 of its own pixels, of which a screen has one or two
_LABELLED = 170  # positions that still get a label each
LETTER = 0.078  # inches, about what a letter takes


def styled() -> Any:
    """The look of all figures, as a context manager or a decorator."""
    return matplotlib.rc_context(STYLE)


def png(figure: Figure, dpi: Number = PIXELS) -> bytes:
    """The figure as PNG bytes, the same for the same data."""
    stream = io.BytesIO()
    with styled():
        figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def grid(
    columns: Sequence[Number],
    rows: Sequence[Number],
    *,
    left: Number = 0.8,
    right: Number = 0.15,
    top: Number = 0.35,
    bottom: Number = 0.55,
    across: Number = 0.0,
    down: Number = 0.0,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure and its axes, row by row, all lengths in inches.

    Args:
        columns: widths. rows: heights. left, right, top, bottom: margins for labels. across, down: between axes.
    """
    width = left + sum(columns) + across * (len(columns) - 1) + right
    height = top + sum(rows) + down * (len(rows) - 1) + bottom
    figure = Figure(figsize=(width, height))
    axes: list[list[Axes]] = []
    y = height - top
    for tall in rows:
        y, x = y - tall, left
        axes.append([])
        for wide in columns:
            axes[-1].append(figure.add_axes((x / width, y / height, wide / width, tall / height)))
            x += wide + across
        y -= down
    return figure, axes


@styled()
def gap_figure(targets: Mapping[str, Sequence[Layer]]) -> Figure:
    """Calibrated gap per layer in network order, one panel a metric, all targets side by side.

    Bars are intervals, the line at 0 is what no difference would give, filled marks have p < 0.05 (`p_family`, for all
    layers together, where it is known).

    Args:
        targets: name of the target -> its layers, in the order of the first target; q, k and v share a mark where all
            their gaps are equal.
    """
    gaps = {target: {layer.name: layer.gap for layer in layers} for target, layers in targets.items()}
    names = [layer.name for layer in next(iter(targets.values()))]
    metrics = list(dict.fromkeys(metric for by_name in gaps.values() for gap in by_name.values() for metric in gap))
    along = places(names, {name: [by_name.get(name) for by_name in gaps.values()] for name in names})
    figure, axes = _panels(along, len(metrics), 1.75)
    for axis, metric in zip(axes, metrics, strict=True):
        for number, (target, by_name) in enumerate(gaps.items()):
            shift = 0.3 * (number - (len(gaps) - 1) / 2)
            rows = [(place.x + shift, by_name[place.names[0]][metric]) for place in along
                    if metric in by_name.get(place.names[0], {})]  # fmt: skip
            _gap_marks(axis, rows, COLOURS[number % len(COLOURS)], "osD^vPX"[number % 7], target)
        axis.axhline(0, color=INK, linewidth=1.0)
        axis.set_title(words(metric), pad=18 if axis is axes[0] else 6)
        axis.set_ylabel("gap (no unit)")
    _layer_axis(axes, along)
    handles, labels = axes[0].get_legend_handles_labels()
    for filled, label in ((True, f"p < {SIGNIFICANT:g}"), (False, f"p ≥ {SIGNIFICANT:g}")):
        handles += axes[0].plot([], [], "o", color=GREY, markerfacecolor=GREY if filled else "white", markersize=5)
        labels.append(label)
    _top_legend(figure, handles, labels)
    return figure


def _gap_marks(axis: Axes, rows: Sequence[tuple[float, Gap]], colour: str, marker: str, label: str) -> None:
    ends = [(x, gap.low, gap.high) for x, gap in rows if gap.low is not None and gap.high is not None]
    if ends:
        axis.vlines(*zip(*ends, strict=True), color=colour, linewidth=1.6, alpha=0.55)
    for filled in (True, False):
        points = [(x, gap.value) for x, gap in rows if significant(gap) == filled]
        axis.plot(
            [x for x, _ in points],
            [value for _, value in points],
            linestyle="none",
            marker=marker,
            markersize=4.6,
            color=colour,
            markerfacecolor=colour if filled else "white",
            label=label if filled else None,
        )


def _panels(along: Sequence[Place], count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Axes under each other that share the layers, with room for block names above and kinds below."""
    width = min(18.0, max(PAGE - 1.45, 0.115 * (along[-1].x + 8)))
    below = LETTER * max(len(place.kind) for place in along) if len(along) <= _LABELLED else 0.1
    figure, axes = grid([width], [height] * count, left=0.7, right=0.75, top=0.75, bottom=0.4 + below, down=0.35)
    return figure, [axis for (axis,) in axes]


def _top_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.5 / figure.get_figwidth(), 1), ncols=len(labels),
        borderaxespad=0.1,
    )  # fmt: skip


def _layer_axis(axes: Sequence[Axes], along: Sequence[Place]) -> None:
    """Kinds below, blocks above, every second stage (or block, where there are no stages) shaded."""
    blocks = list(dict.fromkeys(place.block for place in along))
    spans = {block: [place.x for place in along if place.block == block] for block in blocks}
    stages = list(dict.fromkeys(block.rpartition(".")[0] for block in blocks))
    for axis in axes:
        for number, block in enumerate(blocks):
            order = stages.index(block.rpartition(".")[0]) if len(stages) > 1 else number
            if order % 2 == 0:
                axis.axvspan(spans[block][0] - 0.9, spans[block][-1] + 0.9, color="#f3f4f6", linewidth=0, zorder=-1)
        axis.grid(axis="x", visible=False)
        axis.set(xticks=[], xlim=(along[0].x - 0.9, along[-1].x + 0.9))
    # As text: a tick costs three times as much.
    for block in blocks:
        middle = float(np.mean(spans[block]))
        axes[0].text(middle, 1.02, block, transform=axes[0].get_xaxis_transform(), ha="center", fontsize=7.5)
    last, size = axes[-1], 8.0 if len(along) <= 60 else 6.5
    if len(along) <= _LABELLED:
        for place in along:
            last.text(
                place.x, -0.03, place.kind, transform=last.get_xaxis_transform(), rotation=90, ha="center", va="top",
                fontsize=size,
            )  # fmt: skip
    note = "" if len(along) <= _LABELLED else ", without labels"
    below = 0 if note else 72 * LETTER * max(len(place.kind) for place in along)
    last.set_xlabel(f"layers in network order{note}; above: stage.block", labelpad=6 + below)


@styled()
def curve_figure(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel a task: see `claims.rank_curves`; ranks at equal steps, seeds as points, means as rings."""
    width = min(4.6, (PAGE - 0.8 - 0.9 * (len(curves) - 1)) / len(curves) - 0.2)
    figure, (axes,) = grid([width] * len(curves), [2.6], left=0.8, across=0.9)
    for axis, (task, curve) in zip(axes, curves.items(), strict=True):
        ranks = [name for name in curve if name not in (FROZEN, FULL)]
        for name, colour in ((FROZEN, GREY), (FULL, GREEN)):
            if errors := curve.get(name):
                axis.axhspan(min(errors), max(errors), color=colour, alpha=0.18, linewidth=0)
                axis.axhline(fmean(errors), color=colour, linewidth=1.2)
                axis.annotate(
                    f"{name} body" if name == FROZEN else "full fine-tuning",
                    (0, fmean(errors)), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
                    color=colour,
                )  # fmt: skip
        for place, rank in enumerate(ranks):
            axis.plot([place] * len(curve[rank]), curve[rank], "o", color=BLUE, markersize=4, alpha=0.7)
        axis.plot(range(len(ranks)), [fmean(curve[rank]) for rank in ranks], "o-", color=BLUE, markersize=9, mfc="none")
        axis.set(xlabel="uniform rank of every layer", ylabel="test error", title=task)
        axis.set(xlim=(-0.5, max(1, len(ranks)) - 0.5), xticks=range(len(ranks)), xticklabels=ranks)
    return figure


@styled()
def nested_figure(curves: Mapping[str, Rows], separate: Sequence[tuple[int, float]], task: Task) -> Figure:
    """Test metric against rank: a line for every nested fine-tune, a ring for every separate one.

    Args:
        curves: tag -> rows of rank_curve.csv. separate: see `rank_curve.separate_runs`.
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

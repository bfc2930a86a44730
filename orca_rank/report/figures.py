"""Figures of a run: plain data in, a matplotlib Figure out; nothing is read, shown or saved here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orca_rank.report.canvas import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    LETTER,
    ORANGE,
    PAGE,
    Number,
    grid,
    sheet,
    styled,
    words,
)
from orca_rank.report.results import Interval

NUMBERED = 12  # marks with a number and a name in a legend; more have neither


class Gallery(NamedTuple):
    """Test samples with what was predicted of them: inputs (n, h, w), h = 1 for series; metric (n,); a title; the kind
    of task. targets, predictions: fields (n, h', w'), classes (n, h', w'), vectors (n, k), or booleans and
    probabilities (n, labels)."""

    inputs: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    metric: list[float]
    input_label: str
    kind: str = "dense"


@dataclass(frozen=True)
class Point:
    """A mark of `comparison_figure`: its name in the legend, the kind that colours it, where it stands."""

    name: str
    kind: str
    parameters: float
    value: Interval


@styled()
def alignment_figure(
    curve: Sequence[Mapping[str, Number]], distances: Mapping[str, tuple[Interval, Interval]], objective: str
) -> Figure:
    """The alignment's objective per epoch, and distances on held-out data before and after.

    Args:
        curve: rows with `epoch` and `loss`, and `lr` where it is known.
        distances: name -> (before, after); may be empty.
        objective: what `loss` is, for the axis.
    """
    shares, room = [*([2.4] if curve else []), *[1.0] * len(distances)], PAGE - 0.95 + 0.75
    wide = min(1.9, (room - 0.75 * len(shares)) / sum(shares))
    figure, (axes,) = grid([wide * share for share in shares], [2.3], across=0.75)
    if curve:
        axis = axes.pop(0)
        axis.plot([row["epoch"] for row in curve], [row["loss"] for row in curve], color=BLUE, marker="o", markersize=3)
        steps = [row["epoch"] - 0.5 for before, row in pairwise(curve) if row.get("lr") != before.get("lr")]
        for step in steps:
            axis.axvline(step, color=GREY, linewidth=0.8, linestyle=":")
        note = " (dotted: the learning rate changes)" if steps else ""
        axis.set(xlabel=f"epoch{note}", ylabel=objective, title="objective in training")
        _whole_epochs(axis)
    for axis, (name, pair) in zip(axes, distances.items(), strict=True):
        for place, (one, colour) in enumerate(zip(pair, (GREY, BLUE), strict=True)):
            _interval(axis, place, one, colour)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(xlim=(-0.4, 1.9), ylabel=name, title="held-out data")
        axis.set_xticks([0, 1], ["before", "after"])
        axis.margins(y=0.15)
    return figure


def _interval(axis: Axes, x: Number, estimate: Interval, colour: str) -> None:
    if estimate.low is not None and estimate.high is not None:
        axis.plot([x, x], [estimate.low, estimate.high], color=colour, linewidth=2.2, alpha=0.55)
    axis.plot([x], [estimate.value], marker="o", markersize=7, color=colour, linestyle="none")
    axis.annotate(f"{estimate.value:.3g}", (x, estimate.value), xytext=(8, 0), textcoords="offset points", va="center")


@styled()
def learning_curves(curves: Mapping[str, Sequence[Mapping[str, Number]]], metric: str, unit: str) -> Figure:
    """Training loss and validation metric of every fine-tune by epoch.

    Args:
        curves: tag -> rows with `epoch`, `train/loss` and `val/<metric>`; a missing value is left out.
        metric: its name, as in the rows. unit: for the axis.
    """
    named = len(curves) <= NUMBERED
    figure, (panels,) = grid([4.45, 4.45], [2.6], across=0.95, right=0.25, bottom=_legend_room(len(curves)))
    for axis, column, label in zip(
        panels, ("train/loss", f"val/{metric}"), ("training loss", _label(metric, unit)), strict=True
    ):
        values: list[Number] = []
        for number, (tag, rows) in enumerate(curves.items()):
            points = [(row["epoch"], row[column]) for row in rows if row.get(column) is not None]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            values += y
            style = _line(number) | ({"marker": "o", "markersize": 4} if len(points) == 1 else {})
            axis.plot(x, y, label=f"{number + 1}  {tag}", **style, alpha=1.0 if named else 0.5)
            if named:
                axis.annotate(str(number + 1), (x[-1], y[-1]), xytext=(4, 0), textcoords="offset points", va="center")
        axis.set(xlabel="epoch", ylabel=label, title="training" if column == "train/loss" else "validation")
        _log_if_wide(axis, values)
        _whole_epochs(axis)
    _legend(figure, panels[0], len(curves))
    return figure


@styled()
def comparison_figure(points: Sequence[Point], metric: str, unit: str, baselines: Mapping[str, Number]) -> Figure:
    """Test metric against trainable parameters, one mark a point, numbered in their order.

    Args:
        points: fine-tunes, or means over seeds. metric, unit: for the axis. baselines: name -> value, dashed lines.
    """
    figure, ((axis,),) = grid([9.9], [2.8], right=0.2, bottom=_legend_room(len(points)))
    kinds = list(dict.fromkeys(point.kind for point in points))
    for number, point in enumerate(points):
        kind = kinds.index(point.kind)
        colour = COLOURS[kind % len(COLOURS)]
        place = (point.parameters, point.value.value)
        if point.value.low is not None and point.value.high is not None:
            axis.plot([place[0]] * 2, [point.value.low, point.value.high], color=colour, linewidth=1.8, alpha=0.55)
        marker = "osD^vPX"[kind % 7]
        label = f"{number + 1}  {point.name}"
        axis.plot([place[0]], [place[1]], marker, color=colour, markersize=8, label=label)
        if len(points) <= NUMBERED:
            axis.annotate(str(number + 1), place, xytext=(6, 5), textcoords="offset points")
    _baselines(axis, baselines)
    sizes = sorted({point.parameters for point in points})
    if sizes[0] > 0 and sizes[-1] > 5 * sizes[0]:
        axis.set_xscale("log")
    elif len(sizes) == 1:
        axis.set_xticks(sizes, [f"{sizes[0]:,.0f}"])
    else:
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.set(xlabel="trainable parameters", ylabel=f"test {_label(metric, unit)}")
    axis.margins(x=0.12, y=0.18)
    values = [point.value.value for point in points]
    _log_if_wide(axis, values + list(baselines.values()))
    if axis.get_yscale() == "linear":
        axis.set_ylim(bottom=min(0.0, *values))
    _legend(figure, axis, len(points))
    return figure


@styled()
def parts_figure(parts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Trainable parameters by part, one stacked bar a row.

    Args:
        parts: row -> {"adapter", "embedder", "predictor", "other"} in parameters.
    """
    left = 0.3 + LETTER * max(len(row) for row in parts)
    figure, ((axis,),) = grid([max(5.0, PAGE - 0.15 - left)], [0.36 * len(parts)], left=left, top=0.4)
    names = ("adapter", "embedder", "predictor", "other")
    start = np.zeros(len(parts))
    for name, colour in zip(names, (BLUE, ORANGE, GREEN, GREY), strict=True):
        width = np.array([float(row.get(name, 0)) for row in parts.values()])
        if width.any():
            axis.barh(list(parts), width, left=start, color=colour, label=name, height=0.62)
        start += width
    for place, total in enumerate(start):
        axis.annotate(f"{int(total):,}", (total, place), xytext=(5, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(parts)), list(parts))
    axis.set_ylim(len(parts) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.set(xlabel="trainable parameters", xlim=(0, max(1.0, 1.14 * start.max())))
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names), borderaxespad=0.2)
    return figure


@styled()
def gallery_figure(
    inputs: Float[np.ndarray, "n h w"],
    targets: Float[np.ndarray, "n hh ww"],
    predictions: Float[np.ndarray, "n hh ww"],
    errors: Sequence[Number],
    input_label: str,
) -> Figure:
    """Input, target, prediction and their difference, one row a test sample.

    Args:
        inputs: what the network sees, one channel. targets, predictions: in physical units.
        errors: metric of every sample. input_label: title of the first column.
    """
    wide, bar, tall = 2.0, 0.62, 2.0 * targets.shape[1] / targets.shape[2]
    left = [0.1 + column * (wide + bar + 0.1) for column in range(4)]
    figure, axis = sheet(left[3] + wide + bar + 0.1, 0.3 + len(inputs) * (tall + 0.3))
    for x, title in zip(left, (input_label, "target", "prediction", "prediction − target"), strict=True):
        axis.text(x, 0.2, title, fontsize=10, fontweight="bold")
    for number, (error, x, y, guess) in enumerate(zip(errors, inputs, targets, predictions, strict=True)):
        top = 0.3 + number * (tall + 0.3)
        low, high = float(min(y.min(), guess.min())), float(max(y.max(), guess.max()))
        limit = float(np.abs(guess - y).max()) or 1.0
        for place, field, colours, ends in (
            (left[0], x, "Greys", (float(x.min()), float(x.max()))),
            (left[1], y, "viridis", (low, high)),
            (left[2], guess, "viridis", (low, high)),
            (left[3], guess - y, "RdBu_r", (-limit, limit)),
        ):
            box = (place, place + wide, top + tall, top)
            axis.imshow(field, colours, vmin=ends[0], vmax=ends[1], extent=box, aspect="auto")
            _colour_bar(axis, place + wide + 0.05, top, tall, colours, ends)
        axis.text(left[3] + wide / 2, top + tall + 0.17, f"relative L2 {error:.3f}", ha="center")
    axis.set(xlim=(0, figure.get_figwidth()), ylim=(figure.get_figheight(), 0))
    return figure


def _colour_bar(axis: Axes, x: Number, top: Number, tall: Number, colours: str, ends: tuple[Number, Number]) -> None:
    """A strip of all colours with the values at its ends."""
    strip = np.linspace(ends[1], ends[0], 128)[:, None]
    axis.imshow(strip, colours, vmin=ends[0], vmax=ends[1], extent=(x, x + 0.08, top + tall, top), aspect="auto")
    for y, value, side in ((top, ends[1], "top"), (top + tall, ends[0], "bottom")):
        near_zero = abs(value) < 1e-3 * (ends[1] - ends[0])
        axis.text(x + 0.11, y, "0" if near_zero else f"{value:.2g}", fontsize=7.5, va=side)


def _label(metric: str, unit: str) -> str:
    return f"{words(metric)}\n({unit})"


def _line(number: int) -> dict[str, Any]:
    """Colour and dashes of the fine-tune of this number: colours repeat with other dashes."""
    dashes = ("-", "--", ":", "-.")
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes[number // len(COLOURS) % len(dashes)]}


def _baselines(axis: Axes, baselines: Mapping[str, Number]) -> None:
    for number, (name, value) in enumerate(baselines.items()):
        axis.axhline(value, color=INK, linewidth=1.1, linestyle=("--", ":")[number % 2])
        axis.annotate(
            f"{name}: {value:.4g}", (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", fontsize=8,
        )  # fmt: skip


def _legend_room(count: int) -> Number:
    """Inches below the axes for their labels and a legend of so many entries in two columns."""
    return 0.6 + (0.19 * -(-count // 2) if count <= NUMBERED else 0.0)


def _legend(figure: Figure, axis: Axes, count: int) -> None:
    if count <= NUMBERED:
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.06, 0), ncols=2, borderaxespad=0.1)


def _log_if_wide(axis: Axes, values: Sequence[Number]) -> None:
    """A logarithmic axis where positive values span more than a factor of 20."""
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale("log")


def _whole_epochs(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))

"""Figures of a run: plain data in, a matplotlib Figure out; nothing is read, shown or saved here.

Figures are made without pyplot, so there is no global state and nothing to close. Colours are Okabe and Ito's, which
remain distinct to colour-blind readers. Figures of many layers are in `orca_rank.layer_plots`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, INK = "#8a8f98", "#24292f"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
STYLE = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
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
Number = float
_UPPER = ("l2", "mmd", "otdd")
_NUMBERED = 12  # fine-tunes named in a legend; more are named by their number alone


def styled() -> Any:
    """The look of all figures, as a context manager or a decorator."""
    return matplotlib.rc_context(STYLE)


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG bytes, the same for the same data."""
    stream = io.BytesIO()
    with styled():
        figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


@styled()
def alignment_figure(
    curve: Sequence[Mapping[str, Number]], distances: Mapping[str, Mapping[str, Any]], objective: str = "distance"
) -> Figure:
    """The alignment's objective per epoch, and distances on held-out data before and after.

    Args:
        curve: rows with `epoch` and `loss`, and `lr` where it is known.
        distances: name -> {"before": {"value", "low", "high"}, "after": the same}; may be empty.
        objective: what `loss` is, for the axis.
    """
    shapes = [1.9, *[1.0] * len(distances)] if curve else [1.0] * len(distances)
    figure = Figure(figsize=(min(11.0, 2.9 * sum(shapes)), 3.1), layout="constrained")
    axes = list(figure.subplots(1, len(shapes), width_ratios=shapes, squeeze=False)[0])
    if curve:
        axis = axes.pop(0)
        epochs = [row["epoch"] for row in curve]
        axis.plot(epochs, [row["loss"] for row in curve], color=BLUE, marker="o", markersize=3)
        pairs = pairwise(curve)
        steps = [row["epoch"] - 0.5 for before, row in pairs if row.get("lr") != before.get("lr")]
        for step in steps:
            axis.axvline(step, color=GREY, linewidth=0.8, linestyle=":")
        note = " (dotted: the learning rate changes)" if steps else ""
        axis.set(xlabel=f"epoch{note}", ylabel=objective, title="objective in training")
        _whole_epochs(axis)
    for axis, (name, pair) in zip(axes, distances.items(), strict=True):
        for place, (when, colour) in enumerate((("before", GREY), ("after", BLUE))):
            _interval(axis, place, pair[when], colour)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(xlim=(-0.5, 1.9), ylabel=name, title="held-out data")
        axis.set_xticks([0, 1], ["before", "after"])
        axis.margins(y=0.15)
    return figure


def _interval(axis: Axes, x: Number, estimate: Mapping[str, Any], colour: str) -> None:
    value = estimate["value"]
    if estimate.get("low") is not None and estimate.get("high") is not None:
        axis.plot([x, x], [estimate["low"], estimate["high"]], color=colour, linewidth=2.2, alpha=0.55)
    axis.plot([x], [value], marker="o", markersize=7, color=colour, linestyle="none")
    axis.annotate(f"{value:.3g}", (x, value), xytext=(8, 0), textcoords="offset points", va="center")


@styled()
def learning_curves(curves: Mapping[str, Sequence[Mapping[str, Number]]], metric: str, unit: str) -> Figure:
    """Training loss and validation metric of every fine-tune by epoch.

    Args:
        curves: tag -> rows with `epoch`, `train/loss` and `val/<metric>`; a missing value is left out.
        metric: its name, as in the rows. unit: for the axis.
    """
    figure = Figure(figsize=(10.5, 3.7), layout="constrained")
    panels = figure.subplots(1, 2)
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
            axis.plot(x, y, label=f"{number + 1}  {tag}", **_line(number))
            axis.annotate(str(number + 1), (x[-1], y[-1]), xytext=(4, 0), textcoords="offset points", va="center")
        axis.set(xlabel="epoch", ylabel=label, title="training" if column == "train/loss" else "validation")
        _log_if_wide(axis, values)
        _whole_epochs(axis)
    _legend(figure, panels[0], len(curves))
    return figure


@styled()
def comparison_figure(
    rows: Sequence[Mapping[str, Any]], metric: str, unit: str, baselines: Mapping[str, Number]
) -> Figure:
    """Test metric against trainable parameters, one point a fine-tune, numbered as `rows` are.

    Args:
        rows: with `tag`, `adapter`, `trainable_total` and `test`.
        metric, unit: for the axis. baselines: name -> value, dashed lines.
    """
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    axis = figure.subplots()
    adapters = list(dict.fromkeys(row["adapter"] for row in rows))
    markers = "osD^vPX"
    for number, row in enumerate(rows):
        kind = adapters.index(row["adapter"])
        axis.plot(
            [row["trainable_total"]],
            [row["test"]],
            marker=markers[kind % len(markers)],
            color=COLOURS[kind % len(COLOURS)],
            markersize=8,
            linestyle="none",
            label=f"{number + 1}  {row['tag']}",
        )
        place = (row["trainable_total"], row["test"])
        axis.annotate(str(number + 1), place, xytext=(6, 5), textcoords="offset points")
    _baselines(axis, baselines)
    sizes = [row["trainable_total"] for row in rows]
    if min(sizes) > 0 and max(sizes) > 5 * min(sizes):
        axis.set_xscale("log")
    else:
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.set(xlabel="trainable parameters", ylabel=f"test {_label(metric, unit)}")
    axis.margins(x=0.12, y=0.18)
    _log_if_wide(axis, [row["test"] for row in rows] + list(baselines.values()))
    if axis.get_yscale() == "linear":
        axis.set_ylim(bottom=min(0.0, *(row["test"] for row in rows)))
    _legend(figure, axis, len(rows))
    return figure


@styled()
def parts_figure(parts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Trainable parameters by part, one stacked bar a row.

    Args:
        parts: row -> {"adapter", "embedder", "predictor", "other"} in parameters.
    """
    figure = Figure(figsize=(10.5, 0.9 + 0.42 * len(parts)), layout="constrained")
    axis = figure.subplots()
    names = ("adapter", "embedder", "predictor", "other")
    left = np.zeros(len(parts))
    for name, colour in zip(names, (BLUE, ORANGE, GREEN, GREY), strict=True):
        width = np.array([float(row.get(name, 0)) for row in parts.values()])
        if width.any():
            axis.barh(list(parts), width, left=left, color=colour, label=name, height=0.62)
        left += width
    for place, total in enumerate(left):
        axis.annotate(f"{int(total):,}", (total, place), xytext=(5, 0), textcoords="offset points", va="center")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.set(xlabel="trainable parameters", xlim=(0, max(1.0, 1.14 * left.max())))
    figure.legend(loc="outside upper center", ncols=len(names))
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
    count = len(inputs)
    figure = Figure(figsize=(10.5, 2.35 * count + 0.3), layout="constrained")
    panels = figure.subplots(count, 4, squeeze=False)
    for row, error, x, y, guess in zip(panels, errors, inputs, targets, predictions, strict=True):
        low, high = float(min(y.min(), guess.min())), float(max(y.max(), guess.max()))
        limit = float(np.abs(guess - y).max()) or 1.0
        images = [
            row[0].imshow(x, cmap="Greys"),
            row[1].imshow(y, cmap="viridis", vmin=low, vmax=high),
            row[2].imshow(guess, cmap="viridis", vmin=low, vmax=high),
            row[3].imshow(guess - y, cmap="RdBu_r", vmin=-limit, vmax=limit),
        ]
        for axis, image in zip(row, images, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            axis.spines[:].set_visible(False)
            bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03)
            bar.ax.tick_params(labelsize=7)
            bar.outline.set_visible(False)
        row[3].set_xlabel(f"relative L2 {error:.3f}")
    for axis, title in zip(panels[0], (input_label, "target", "prediction", "prediction − target"), strict=True):
        axis.set_title(title)
    return figure


def words(name: str) -> str:
    """A metric's name as a reader writes it: relative_l2 -> relative L2."""
    return " ".join(part.upper() if part in _UPPER else part for part in name.replace("_", " ").split())


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


def _legend(figure: Figure, axis: Axes, count: int) -> None:
    if count <= _NUMBERED:
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2)


def _log_if_wide(axis: Axes, values: Sequence[Number]) -> None:
    """A logarithmic axis where positive values span more than a factor of 20."""
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale("log")


def _whole_epochs(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))

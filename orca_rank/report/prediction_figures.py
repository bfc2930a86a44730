"""Test samples as a fine-tune predicts them, drawn as the kind of task asks."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from orca_rank.report.canvas import BLUE, COLOURS, GREY, INK, VERMILLION, Number, grid, sheet, styled, words
from orca_rank.report.figures import Gallery, gallery_figure
from orca_rank.report.page import cell
from orca_rank.task import KINDS

PANELS = 8  # numbers of a vector that are drawn
LABELS = 20  # labels that are drawn, the most frequent
UNKNOWN = "#d5d8dd"
IMAGES, EVERY = 4, 512  # samples of a figure that draws each, and of one that draws them together


def samples(kind: str) -> int:
    """How many test samples the figure of a kind of task shows."""
    return EVERY if kind in ("regression", "multilabel") else IMAGES


def prediction_figure(gallery: Gallery) -> Figure:
    """The figure for the kind of a gallery, see `Gallery`."""
    if gallery.kind == "regression":
        return vectors_figure(gallery.targets, gallery.predictions)
    if gallery.kind == "multilabel":
        return labels_figure(gallery.targets, gallery.predictions > 0.5)
    if gallery.inputs.shape[1] == 1:
        return series_figure(gallery)
    if gallery.kind == "segmentation":
        return classes_figure(gallery)
    return gallery_figure(gallery.inputs, gallery.targets, gallery.predictions, gallery.metric, gallery.input_label)


def caption(gallery: Gallery, tag: str) -> str:
    """What the figure shows, in words."""
    count, values = len(gallery.metric), ", ".join(map(cell, gallery.metric[:IMAGES]))
    metric = words(KINDS[gallery.kind].metric)
    metric += "s" if metric.endswith("error") else " errors"
    if gallery.kind == "regression":
        return (
            f"{count} test samples, predicted by {tag} (the best on validation), against their targets; on the line "
            f"they are equal. R² is that of the samples shown."
        )
    if gallery.kind == "multilabel":
        return (
            f"{count} test samples, predicted by {tag} (the best on validation): how many have each label and how many "
            f"are given it, and the F₁ of the label; at most {LABELS} labels, the most frequent."
        )
    first = f"The first {count} test samples, predicted by {tag} (the best on validation)."
    if gallery.inputs.shape[1] == 1:
        return f"{first} {metric}: {values}."
    if gallery.kind == "segmentation":
        return f"{first} Pixels without a label are grey; {metric}: {values}."
    return f"{first} Target and prediction share a colour scale in each row; {metric}: {values}."


@styled()
def vectors_figure(targets: Float[np.ndarray, "n k"], predictions: Float[np.ndarray, "n k"]) -> Figure:
    """Prediction against target, one panel a number of the vector, at most `PANELS`."""
    shown = min(PANELS, targets.shape[1])
    across = min(4, shown)
    figure, rows = grid([2.0] * across, [2.0] * -(-shown // across), across=0.65, down=0.85, left=0.9)
    axes = [axis for row in rows for axis in row]
    for axis in axes[shown:]:
        axis.set_axis_off()
    for place, axis in enumerate(axes[:shown]):
        y, guess = targets[:, place], predictions[:, place]
        known = np.isfinite(y) & np.isfinite(guess)
        y, guess = y[known], guess[known]
        if len(y):
            ends = float(min(y.min(), guess.min())), float(max(y.max(), guess.max()))
            axis.plot(ends, ends, color=GREY, linewidth=1.0)
            axis.plot(y, guess, ".", color=BLUE, markersize=4, alpha=0.6)
            spread = float(((y - y.mean()) ** 2).sum())
            axis.set_title(f"R² {1 - float(((y - guess) ** 2).sum()) / spread:.3f}" if spread > 0 else "constant")
        axis.set(xlabel="target" if targets.shape[1] == 1 else f"target {place}")
        if place % across == 0:
            axis.set(ylabel="prediction")
    return figure


@styled()
def labels_figure(targets: Bool[np.ndarray, "n c"], given: Bool[np.ndarray, "n c"]) -> Figure:
    """How many samples have each label and how many are given it, and F₁ = 2 |P ∩ Y| / (|P| + |Y|)."""
    order = np.argsort(-targets.sum(0), kind="stable")[:LABELS]
    y, guess = targets[:, order], given[:, order]
    both, sums = (y & guess).sum(0), y.sum(0) + guess.sum(0)
    f1 = np.where(sums > 0, 2 * both / np.maximum(sums, 1), np.nan)
    figure, ((left, right),) = grid([4.6, 4.6], [max(1.0, 0.3 * len(order))], across=0.6, left=0.6)
    place = np.arange(len(order))
    left.barh(place - 0.19, y.sum(0), height=0.36, color=GREY, label="have it")
    left.barh(place + 0.19, guess.sum(0), height=0.36, color=BLUE, label="are given it")
    right.barh(place, np.nan_to_num(f1), height=0.6, color=BLUE)
    for axis, what in ((left, "test samples"), (right, "F₁")):
        axis.set_yticks(place, [str(label) for label in order])
        axis.set(ylim=(len(order) - 0.5, -0.5), xlabel=what)
        axis.grid(axis="y", visible=False)
    left.set(ylabel="label")
    left.legend(loc="lower right")
    right.set_xlim(0, 1)
    return figure


@styled()
def classes_figure(gallery: Gallery) -> Figure:
    """Input, target classes, predicted classes and the pixels that differ, one row a test sample."""
    y, guess = gallery.targets, gallery.predictions
    colours = class_colours(1 + int(max(y.max(), guess.max())))
    wide = 2.4
    tall = wide * y.shape[1] / y.shape[2]
    left = [0.1 + column * (wide + 0.15) for column in range(4)]
    figure, axis = sheet(left[3] + wide + 0.1, 0.3 + len(y) * (tall + 0.3))
    for x, title in zip(left, (gallery.input_label, "target", "prediction", "wrong"), strict=True):
        axis.text(x, 0.2, title, fontsize=10, fontweight="bold")
    for number, (error, image, true, found) in enumerate(zip(gallery.metric, gallery.inputs, y, guess, strict=True)):
        top = 0.3 + number * (tall + 0.3)
        wrong = ListedColormap(["white", VERMILLION, UNKNOWN])((true != found) + (true < 0).astype(int))
        for x, picture in zip(left, (image, colours[true], colours[found], wrong), strict=True):
            axis.imshow(picture, "Greys", extent=(x, x + wide, top + tall, top), aspect="auto", interpolation="nearest")
        axis.text(left[3] + wide / 2, top + tall + 0.17, f"pixel error {error:.3f}", ha="center")
    axis.set(xlim=(0, figure.get_figwidth()), ylim=(figure.get_figheight(), 0))
    return figure


def class_colours(count: int) -> Float[np.ndarray, "classes 4"]:
    """A colour a class, repeated in lighter shades; the last is that of what has none (−1)."""
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in COLOURS])
    shade = np.arange(count) // len(COLOURS) % 4 / 5
    colours = rgb[np.arange(count) % len(COLOURS)]
    unknown = [[int(UNKNOWN[i : i + 2], 16) / 255 for i in (1, 3, 5)]]
    mixed = np.concatenate([colours + (1 - colours) * shade[:, None], unknown])
    return np.concatenate([mixed, np.ones((len(mixed), 1))], 1)


@styled()
def series_figure(gallery: Gallery) -> Figure:
    """Input, and target with prediction, one row a series; classes as steps."""
    count = len(gallery.metric)
    figure, rows = grid([4.5, 4.5], [1.2] * count, across=0.8, down=0.45, bottom=0.6)
    parts = (gallery.inputs, gallery.targets, gallery.predictions)
    style = "steps-mid" if gallery.kind == "segmentation" else "default"
    for number, ((left, right), x, y, guess) in enumerate(zip(rows, *parts, strict=True)):
        left.plot(x[0], color=INK, linewidth=0.9)
        right.plot(y[0], color=GREY, label="target", drawstyle=style)
        right.plot(guess[0], color=BLUE, linewidth=1.1, label="prediction", drawstyle=style)
        right.set_title(_error(gallery.kind, gallery.metric[number]))
        if number == 0:
            left.set_title(gallery.input_label)
            right.legend(loc="upper right", ncols=2)
        if number == count - 1:
            left.set(xlabel="place")
            right.set(xlabel="place")
    return figure


def _error(kind: str, value: Number) -> str:
    return f"{words(KINDS[kind].metric)} {value:.3f}"

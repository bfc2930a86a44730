"""Test samples as a fine-tune predicts them, drawn as the kind of task asks."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from orca_rank.report.draw import LETTER, Number, Panel, Picture, Scale, pixels, scale, short, words
from orca_rank.report.page import cell
from orca_rank.task import KINDS

PANELS = 8  # numbers of a vector that are drawn
LABELS = 20  # labels that are drawn, the most frequent
IMAGES, EVERY = 4, 512  # samples of a figure that draws each, and of one that draws them together
FEW = 6  # values of an input that have a name each, where there are no more
_CSV = 60_000  # rows, about; all predictions are in report/predictions.npz
_WIDE, _GAP = 190, 22  # pixels of a field, and between two
_GREY = ((250, 250, 250), (70, 75, 82), (20, 22, 26))
_FIELD = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # about viridis
_DIFFERENCE = ((5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31))  # about RdBu
_CLASSES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (89, 99, 110))
_UNKNOWN, _WRONG, _RIGHT = (213, 216, 221), (213, 94, 0), (250, 250, 250)


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


def samples(kind: str) -> int:
    """How many test samples the figure of a kind of task shows."""
    return EVERY if kind in ("regression", "multilabel") else IMAGES


def prediction_figure(gallery: Gallery) -> Picture:
    """The figure for the kind of a gallery, see `Gallery`."""
    if gallery.kind == "regression":
        return vectors_figure(gallery.targets, gallery.predictions)
    if gallery.kind == "multilabel":
        return labels_figure(gallery.targets, gallery.predictions > 0.5)
    if gallery.inputs.shape[1] == 1:
        return series_figure(gallery)
    return classes_figure(gallery) if gallery.kind == "segmentation" else fields_figure(gallery)


def caption(gallery: Gallery, called: str) -> str:
    """What the figure shows, in words. called: the fine-tune."""
    count, values = len(gallery.metric), ", ".join(map(cell, gallery.metric[:IMAGES]))
    metric = words(KINDS[gallery.kind].metric)
    metric += "s" if metric.endswith("error") else " errors"
    if gallery.kind == "regression":
        return (
            f"{count} test samples, predicted by {called} (the best on validation), against their targets; on the line "
            f"they are equal. R² is that of the samples shown."
        )
    if gallery.kind == "multilabel":
        return (
            f"{count} test samples, predicted by {called} (the best on validation): how many have each label and how "
            f"many are given it, and the F₁ of the label; at most {LABELS} labels, the most frequent."
        )
    first = f"The first {count} test samples, predicted by {called} (the best on validation)."
    if gallery.inputs.shape[1] == 1:
        return f"{first} {metric}: {values}."
    if gallery.kind == "segmentation":
        return f"{first} Pixels without a label are grey; {metric}: {values}."
    return f"{first} All targets and predictions share one colour scale, all differences another; {metric}: {values}."


def prediction_rows(gallery: Gallery) -> list[dict[str, Any]]:
    """The numbers of the figure, a row for every value of every target, of the first samples where they are many."""
    rows: list[dict[str, Any]] = []
    count = max(1, _CSV // max(1, gallery.targets[0].size))
    for place in np.ndindex(gallery.targets[:count].shape):
        sample, *where = place
        names = ("row", "column") if len(where) == 2 else ("number",)
        values = (("target", gallery.targets[place]), ("prediction", gallery.predictions[place]))
        rows.append(
            {
                "sample": sample,
                **dict(zip(names, where, strict=True)),
                **{key: f"{float(one):.5g}" for key, one in values},
            }
        )
    return rows


def _columns(gallery: Gallery) -> list[tuple[str, np.ndarray, tuple[float, float], Any]]:
    """Title, fields, ends of the scale and colours of every column of a dense task."""
    y, guess = gallery.targets, gallery.predictions
    limit = float(np.abs(guess - y).max()) or 1.0
    both = float(min(y.min(), guess.min())), float(max(y.max(), guess.max()))
    return [
        (gallery.input_label, gallery.inputs, (float(gallery.inputs.min()), float(gallery.inputs.max())), _GREY),
        ("target", y, both, _FIELD),
        ("prediction", guess, both, _FIELD),
        ("prediction − target", guess - y, (-limit, limit), _DIFFERENCE),
    ]


def fields_image(gallery: Gallery) -> bytes:
    """`fields_figure` without its words, a pixel a value of the target, as PNG: for services that show no SVG."""
    tall, wide = gallery.targets.shape[-2:]
    columns = []
    for _, fields, ends, colours in _columns(gallery):
        shown = [Image.fromarray(pixels(field, *ends, colours)).resize((wide, tall), Image.Resampling.NEAREST)
                 for field in fields]  # fmt: skip
        columns.append(np.concatenate([np.asarray(one) for one in shown]))
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(columns, axis=1)).save(stream, "PNG")
    return stream.getvalue()


def fields_figure(gallery: Gallery) -> Picture:
    """Input, target, prediction and their difference, a row a test sample; a colour scale a column, below it."""
    parts = _columns(gallery)
    draw, tall = _sheet([title for title, *_ in parts], gallery)
    for column, (title, fields, ends, colours) in enumerate(parts):
        for number, (field, error) in enumerate(zip(fields, gallery.metric, strict=True)):
            least, most = short(float(field.min())), short(float(field.max()))
            say = f"sample {number + 1}, {title}: {least} to {most}; {_error(gallery, error)}"
            draw.field(pixels(field, *ends, colours), _box(column, number, tall), say)
        _colours(draw, column, 30 + len(gallery.metric) * (tall + _GAP), np.unique(fields), ends, colours)
    return draw


def _colours(
    draw: Picture, column: int, y: Number, values: np.ndarray, ends: tuple[float, float], colours: Any
) -> None:
    """What the colours of a column mean: a name a value where an input has few, else a strip from end to end."""
    x, named = 4 + column * (_WIDE + 16), column == 0 and len(values) <= FEW
    shown = values if named else np.linspace(*ends, 64)
    wide = min(46.0, _WIDE / len(shown)) if named else _WIDE / 64
    for number, value in enumerate(shown):
        r, g, b = pixels(np.array([[value]]), *ends, colours)[0, 0]
        draw.put("rect", x=x + wide * number, y=y, width=wide + 0.3, height=10.0, fill=f"rgb({r},{g},{b})")
        if named:
            draw.text(x + wide * (number + 0.5), y + 24, short(float(value)), "small", at="middle")
    for place, end, at in ((0.0, ends[0], "start"), (_WIDE, ends[1], "end")) if not named else ():
        zero = abs(end) < 1e-3 * (ends[1] - ends[0])
        draw.text(x + place, y + 24, "0" if zero else short(float(f"{end:.2g}")), "small", at=at)


def classes_figure(gallery: Gallery) -> Picture:
    """Input, target classes, predicted classes and the pixels that differ, a row a test sample."""
    y, guess = gallery.targets, gallery.predictions
    colours = class_colours(1 + int(max(y.max(), guess.max())))
    wrong = np.array([_RIGHT, _WRONG, _UNKNOWN], np.uint8)[(y != guess) + (y < 0).astype(int)]
    ends = float(gallery.inputs.min()), float(gallery.inputs.max())
    draw, tall = _sheet([gallery.input_label, "target", "prediction", "wrong"], gallery)
    for number, error in enumerate(gallery.metric):
        shown = (
            pixels(gallery.inputs[number], *ends, _GREY),
            colours[y[number]],
            colours[guess[number]],
            wrong[number],
        )
        for column, picture in enumerate(shown):
            draw.field(picture, _box(column, number, tall), f"sample {number + 1}: {_error(gallery, error)}")
    return draw


def class_colours(count: int) -> UInt8[np.ndarray, "classes 3"]:
    """A colour a class, repeated in lighter shades; the last is that of what has none (−1)."""
    rgb = np.array(_CLASSES, float)[np.arange(count) % len(_CLASSES)]
    shade = (np.arange(count) // len(_CLASSES) % 4 / 5)[:, None]
    return np.concatenate([rgb + (255 - rgb) * shade, [_UNKNOWN]]).round().astype(np.uint8)


def _sheet(titles: list[str], gallery: Gallery) -> tuple[Picture, float]:
    """A picture with room for fields in columns of these titles, and how tall a field is."""
    tall = _WIDE * gallery.targets.shape[1] / gallery.targets.shape[2]
    draw = Picture(len(titles) * (_WIDE + 16), 30 + len(gallery.metric) * (tall + _GAP) + 30)
    for column, title in enumerate(titles):
        draw.text(4 + column * (_WIDE + 16), 18, title, "head")
    for number, error in enumerate(gallery.metric):
        x, y, *_ = _box(len(titles) - 1, number, tall)
        draw.text(x, y + tall + 14, _error(gallery, error), "small")
    return draw, tall


def _box(column: int, number: int, tall: float) -> tuple[float, float, float, float]:
    return 4.0 + column * (_WIDE + 16), 28 + number * (tall + _GAP), float(_WIDE), tall


def vectors_figure(targets: Float[np.ndarray, "n k"], predictions: Float[np.ndarray, "n k"]) -> Picture:
    """Prediction against target, one panel a number of the vector, at most `PANELS`."""
    shown = min(PANELS, targets.shape[1])
    across = min(4, shown)
    draw = Picture(20 + 255 * across, 270 * -(-shown // across))
    for place in range(shown):
        y, guess = targets[:, place], predictions[:, place]
        known = np.isfinite(y) & np.isfinite(guess)
        y, guess = y[known], guess[known]
        left, top = 75 + 255 * (place % across), 34 + 270 * (place // across)
        both = scale([*y, *guess], left, left + 175, wide=np.inf)
        panel = Panel(draw, both, Scale(both.low, both.high, top + 175, top))
        spread = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
        title = f"R² {1 - float(((y - guess) ** 2).sum()) / spread:.3f}" if spread > 0 else "constant"
        ticks = [(tick, short(tick)) for tick in both.ticks(3)]
        x, shown_y = "target" if targets.shape[1] == 1 else f"target {place}", "" if place % across else "prediction"
        panel.frame(title=title, x=x, y=shown_y, x_ticks=ticks, y_ticks=ticks)
        panel.line([(both.low, both.low), (both.high, both.high)], "fine c6")
        for one, found in zip(y, guess, strict=True):
            panel.mark(float(one), float(found), "dot pale c0", f"target {one:.4g}, prediction {found:.4g}", size=2.2)
    return draw


def labels_figure(targets: Bool[np.ndarray, "n c"], given: Bool[np.ndarray, "n c"]) -> Picture:
    """How many samples have each label and how many are given it, and F₁ = 2 |P ∩ Y| / (|P| + |Y|)."""
    order = np.argsort(-targets.sum(0), kind="stable")[:LABELS]
    y, guess = targets[:, order], given[:, order]
    both, sums = (y & guess).sum(0), y.sum(0) + guess.sum(0)
    left = 24 + LETTER * max(len(str(label)) for label in order)
    draw = Picture(left + 700, 30 + 28 * len(order))
    count, f1 = Scale(0, max(1, int(sums.max())), left, left + 360), Scale(0, 1, left + 430, left + 640)
    draw.text(left, 16, "test samples", "head")
    draw.legend(left + 110, 16, [("s", "bar c6", "have it"), ("s", "bar c0", "are given it")])
    draw.text(left + 430, 16, "F₁", "head")
    for place, label in enumerate(order):
        top = 26 + 28 * place
        draw.text(left - 10, top + 16, str(label), at="end")
        for shift, kind, what, number in ((0, "c6", "have", y), (11, "c0", "are given", guess)):
            total = int(number[:, place].sum())
            draw.box(left, top + shift, count(total) - left, 10, f"bar {kind}", f"{total} {what} label {label}")
        value = float(2 * both[place] / sums[place]) if sums[place] else float("nan")
        draw.box(
            left + 430, top, f1(value) - left - 430 if sums[place] else 0, 21, "bar c0", f"F₁ of {label}: {value:.3f}"
        )
        draw.text(f1(value if sums[place] else 0) + 6, top + 15, f"{value:.2f}" if sums[place] else "unknown", "small")
    return draw


def series_figure(gallery: Gallery) -> Picture:
    """Input, and target with prediction, a row a series; classes as steps."""
    count = len(gallery.metric)
    draw = Picture(1000, 150 * count + 40)
    draw.legend(560, 14, [("-", "c6", "target"), ("-", "c0", "prediction")])
    for number, (x, y, guess) in enumerate(zip(gallery.inputs, gallery.targets, gallery.predictions, strict=True)):
        top = 46 + 150 * number
        for left, shown in ((70, [(x[0], "c6")]), (570, [(y[0], "c6"), (guess[0], "c0")])):
            values = [float(one) for line, _ in shown for one in line]
            panel = Panel(
                draw,
                Scale(0, max(1, len(shown[0][0]) - 1), left, left + 400),
                scale(values, top + 90, top, wide=np.inf),
            )
            title = gallery.input_label if left == 70 else _error(gallery, gallery.metric[number])
            panel.frame(title=title, x="place" if number == count - 1 else "")
            for line, kind in shown:
                panel.line(
                    _steps(line) if gallery.kind == "segmentation" and left > 70 else enumerate(map(float, line)), kind
                )
    return draw


def _steps(line: Int[np.ndarray, " n"] | Float[np.ndarray, " n"]) -> list[tuple[float, float]]:
    return [(place + half, float(value)) for place, value in enumerate(line) for half in (-0.5, 0.5)]


def _error(gallery: Gallery, value: Number) -> str:
    name = "pixel error" if gallery.kind == "segmentation" else words(KINDS[gallery.kind].metric)
    return f"{name} {value:.3f}"

"""Figures of fine-tunes and of the alignment: plain data in, a Picture out; nothing is read or written here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from orca_rank.report.draw import COLOURS, LETTER, SHAPES, Number, Panel, Picture, Scale, scale, short, words
from orca_rank.report.results import PARTS, Interval

NUMBERED = 12  # marks with a number and lines with a name; more have neither
_ROW = 26  # pixels of a row


@dataclass(frozen=True)
class Point:
    """A mark of `comparison_figure`: a fine-tune, or those that differ in nothing but the seed.

    Args:
        kind: colours it. parameters: where it stands. value: its mean with the interval. seeds: each one's value.
        number: of its row in the table.
    """

    name: str
    kind: str
    parameters: float
    value: Interval
    seeds: tuple[float, ...] = ()
    number: int = 0


def comparison_figure(
    points: Sequence[Point], lines: Mapping[str, Interval], metric: str, unit: str, counted: str
) -> Picture:
    """Test metric against trainable parameters; where all have as many, a row each.

    Args:
        points: as `Point` says. lines: what they are compared with, name -> value. counted: which parameters.
    """
    label = f"test {words(metric)} ({unit})"
    if len({point.parameters for point in points}) < 2:
        return _rows(points, lines, label)
    return _against_parameters(points, lines, label, counted)


def _against_parameters(points: Sequence[Point], lines: Mapping[str, Interval], label: str, counted: str) -> Picture:
    kinds = list(dict.fromkeys(point.kind for point in points))
    draw, top = Picture(760, 352 + 18 * len(lines)), 34 if len(kinds) > 1 else 14
    across = scale([p.parameters for p in points], 70, 735, margin=0.1, wide=4)
    up = _clipping([p.value for p in points] + list(lines.values()), [v for p in points for v in p.seeds], 295, top)
    panel = Panel(draw, across, up)
    panel.frame(x=counted, y=label)
    if len(kinds) > 1:
        draw.legend(64, 16, [(SHAPES[i % 5], f"c{i % COLOURS} dot", kind) for i, kind in enumerate(kinds)])
    _levels(panel, lines)
    for point in points:
        place = kinds.index(point.kind)
        colour, say = f"c{place % COLOURS}", f"{point.number}. {point.name}: {_said(point)}"
        for value in point.seeds if len(point.seeds) > 1 else ():
            panel.mark(point.parameters, value, f"dot pale {colour}", f"{point.name}: a seed, {value:.4g}", size=3)
        panel.span(point.parameters, *_clipped(point.value, up), colour)
        kind = "ring" if len(point.seeds) > 1 else "dot"
        panel.mark(point.parameters, point.value.value, f"{kind} {colour}", say, size=5, shape=SHAPES[place % 5])
        if len(points) <= NUMBERED:
            x, y = panel.point(point.parameters, point.value.value)
            draw.text(x + 8, y - 6, str(point.number), "small")
    return draw


def _clipping(shown: Sequence[Interval], seeds: Sequence[float], start: Number, end: Number) -> Scale:
    """A scale over 0 and all values, and over intervals as far as half of that more: those of two seeds have no end."""
    values = [one.value for one in shown] + list(seeds)
    low, high = min(values), max(values)
    if low > 0 and high > 20 * low:
        return scale(values, start, end)
    low = min(0.0, low)
    room = 0.5 * ((high - low) or 1.0)
    return scale([low, *values, *(min(max(one, low), high + room) for one in _ends(shown))], start, end)


def _clipped(one: Interval, up: Scale) -> tuple[float, float]:
    """The ends of an interval as far as the scale goes; without an interval the value itself."""
    low, high = (one.value if end is None else end for end in (one.low, one.high))
    return max(low, up.low), min(high, up.high)


def _rows(points: Sequence[Point], lines: Mapping[str, Interval], label: str) -> Picture:
    """A row each, smallest value first."""
    rows = [(f"{point.number}. {point.name}", point.value, point.seeds, "c0") for point in points]
    rows = sorted([*rows, *((name, value, (), "c6") for name, value in lines.items())], key=lambda row: row[1].value)
    left = 20 + LETTER * max(len(name) for name, *_ in rows)
    draw = Picture(left + 420, 62 + _ROW * len(rows))
    shown = [row[1] for row in rows]
    across = _clipping(shown, [seed for row in rows for seed in row[2]], left, draw.width - 60)
    panel = Panel(draw, across, Scale(0, len(rows), 10, 10 + _ROW * len(rows)))
    foot = 10 + _ROW * len(rows)
    for value in across.ticks(4):
        draw.put("line", "grid", x1=across(value), x2=across(value), y1=10, y2=foot)
        draw.text(across(value), foot + 16, short(value), "small", at="middle")
    draw.text((left + draw.width - 60) / 2, foot + 36, label, at="middle")
    for place, (name, one, seeds, colour) in enumerate(rows):
        x, y = panel.point(one.value, place + 0.5)
        draw.text(left - 12, y + 4, name, at="end")
        for seed in seeds if len(seeds) > 1 else ():
            panel.mark(seed, place + 0.5, f"dot pale {colour}", f"{name}: a seed, {seed:.4g}", size=3)
        low, high = _clipped(one, across)
        draw.put("line", f"span {colour}", x1=across(low), x2=across(high), y1=y, y2=y)
        draw.mark(x, y, f"{'ring' if len(seeds) > 1 else 'dot'} {colour}", f"{name}: {one.value:.4g}", size=5)
        draw.text(x + 10, y - 6, short(one.value), "small")
    return draw


def _levels(panel: Panel, lines: Mapping[str, Interval]) -> None:
    """A dashed line for each with its interval as a band; their names below the axes."""
    draw, up = panel.picture, panel.up
    left, right = panel.ends(panel.across)
    for place, (name, one) in enumerate(sorted(lines.items(), key=lambda pair: -pair[1].value)):
        y, colour, (low, high) = up(one.value), f"c{(place + 2) % COLOURS}", _clipped(one, up)
        if low < high:
            draw.box(left, up(high), right - left, up(low) - up(high), f"bar {colour}", shade=0.1)
        draw.line([(left, y), (right, y)], f"dash {colour}", f"{name}: {_interval_text(one)}")
        draw.legend(64, 350 + 18 * place, [("-", f"dash {colour}", f"{name}: {_interval_text(one)}")])


def _ends(values: Iterable[Interval]) -> list[float]:
    found = [one for value in values for one in (value.value, value.low, value.high)]
    return [one for one in found if one is not None]


def _said(point: Point) -> str:
    seeds = f", {len(point.seeds)} seeds" if len(point.seeds) > 1 else ""
    return f"{_interval_text(point.value)}, {point.parameters:,.0f} parameters{seeds}"


def _interval_text(one: Interval) -> str:
    ends = "" if one.low is None or one.high is None else f" [{one.low:.4g}, {one.high:.4g}]"
    return f"{one.value:.4g}{ends}"


def alignment_figure(
    curve: Sequence[Mapping[str, Number]], distances: Mapping[str, tuple[Interval, Interval]], objective: str
) -> Picture:
    """The alignment's objective per epoch, and distances on held-out data before and after.

    Args:
        curve: rows with `epoch` and `loss`, and `lr` where it is known. distances: name -> (before, after); may be
            empty. objective: what `loss` is, for the axis.
    """
    start = 420 if curve else 0
    draw = Picture(max(start, start + 190 * len(distances)), 240)
    if curve:
        epochs = [row["epoch"] for row in curve]
        panel = Panel(
            draw, Scale(min(epochs) - 0.5, max(epochs) + 0.5, 70, 400), scale([r["loss"] for r in curve], 190, 34)
        )
        panel.frame(title="in training", x="epoch", y=objective, x_ticks=_epochs(epochs))
        for before, row in pairwise(curve):
            if row.get("lr") != before.get("lr"):
                panel.picture.line([panel.point(row["epoch"] - 0.5, end) for end in (panel.up.low, panel.up.high)],
                                   "dash fine c6", f"the learning rate changes to {row.get('lr', 0):.3g}")  # fmt: skip
        panel.line([(row["epoch"], row["loss"]) for row in curve], "c0")
        for row in curve:
            panel.mark(row["epoch"], row["loss"], "dot c0", f"epoch {row['epoch']:.0f}: {row['loss']:.4g}", size=3)
    for number, (name, pair) in enumerate(distances.items()):
        left = start + 190 * number + 62
        panel = Panel(draw, Scale(-0.5, 1.9, left, left + 120), scale([0.0, *_ends(pair)], 190, 34, zero=True))
        panel.frame(title=name, x_ticks=[(0, "before"), (1, "after")])
        for place, (one, kind) in enumerate(zip(pair, ("c6", "c0"), strict=True)):
            panel.span(place, one.low, one.high, kind)
            panel.mark(place, one.value, f"dot {kind}", f"{name} {('before', 'after')[place]}: {_interval_text(one)}")
            x, y = panel.point(place, one.value)
            draw.text(x + 9, y + 4, short(one.value), "small")
    return draw


def learning_curves(curves: Mapping[str, Sequence[Mapping[str, Number]]], metric: str, unit: str) -> Picture:
    """Training loss and validation metric of every fine-tune by epoch.

    Args:
        curves: name -> rows with `epoch`, `train/loss` and `val/<metric>`; a missing value is left out.
        metric: its name, as in the rows. unit: for the axis.
    """
    named = len(curves) <= NUMBERED
    draw = Picture(960, 270 + (18 * -(-len(curves) // 2) if named else 0))
    titles = {"train/loss": "training loss", f"val/{metric}": f"validation {words(metric)} ({unit})"}
    epochs = [row["epoch"] for rows in curves.values() for row in rows]
    for number, (column, title) in enumerate(titles.items()):
        found = {
            name: [(row["epoch"], row[column]) for row in rows if row.get(column) is not None]
            for name, rows in curves.items()
        }
        left = 60 + 480 * number
        up = scale([y for points in found.values() for _, y in points], 215, 34)
        panel = Panel(draw, Scale(min(epochs) - 0.2, max(epochs) + 0.5, left, left + 395), up)
        panel.frame(title=title, x="epoch", x_ticks=_epochs(epochs))
        for place, (name, points) in enumerate(found.items()):
            kind = f"c{place % COLOURS}{' dash' if place // COLOURS % 2 else ''}{'' if named else ' pale'}"
            if len(points) == 1:
                panel.mark(*points[0], f"dot {kind}", f"{name}: {points[0][1]:.4g}", size=3)
            elif points:
                panel.line(points, kind, f"{name}: {points[-1][1]:.4g} in the last epoch")
            if points and named:
                x, y = panel.point(*points[-1])
                draw.text(x + 5, y + 4, str(place + 1), "small")
    for place, name in enumerate(curves if named else ()):
        kind = f"c{place % COLOURS}{' dash' if place // COLOURS % 2 else ''}"
        draw.legend(54 + 480 * (place % 2), 278 + 18 * (place // 2), [("-", kind, f"{place + 1}  {name}")])
    return draw


def parts_figure(parts: Mapping[str, Mapping[str, int]]) -> Picture:
    """Trainable parameters, a row a model: those of the adapter on an axis of their own, the rest by part on another.

    Args:
        parts: row -> {"adapter", "embedder", "predictor", "other"} in parameters.
    """
    left = 20 + LETTER * max(len(row) for row in parts)
    draw = Picture(left + 720, 58 + _ROW * len(parts))
    rest = [name for name in PARTS if name != "adapter"]
    sums = {row: sum(one.get(name, 0) for name in rest) for row, one in parts.items()}
    own = max([1, *(one.get("adapter", 0) for one in parts.values())])
    adapter, other = Scale(0, own, left, left + 270), Scale(0, max([1, *sums.values()]), left + 360, left + 640)
    draw.text(left, 16, "adapter", "head")
    draw.legend(left + 352, 16, [("s", f"bar c{place + 1}", name) for place, name in enumerate(rest)])
    for place, (row, one) in enumerate(parts.items()):
        y = 28 + _ROW * place
        draw.text(left - 10, y + 13, row, at="end")
        count = one.get("adapter", 0)
        draw.box(left, y, adapter(count) - left, 17, "bar c0", f"{row}: {count:,} in the adapter")
        draw.text(adapter(count) + 6, y + 13, f"{count:,}", "small")
        start = 0
        for colour, name in enumerate(rest, 1):
            if count := one.get(name, 0):
                draw.box(other(start), y, other(start + count) - other(start), 17, f"bar c{colour}",
                         f"{row}: {count:,} in the {name}")  # fmt: skip
                start += count
        draw.text(other(start) + 6, y + 13, f"{start:,}", "small")
    foot = 28 + _ROW * len(parts)
    for axis in (adapter, other):
        draw.put("line", "axis", x1=axis.start, x2=axis.end, y1=foot, y2=foot)
        for value in axis.ticks(3):
            draw.text(axis(value), foot + 16, short(value), "small soft", at="middle")
    return draw


def _epochs(epochs: Sequence[Number]) -> list[tuple[Number, str]]:
    last = int(max(epochs, default=0))
    step = max(1, -(-last // 8))
    return [(epoch, str(epoch)) for epoch in range(int(min(epochs, default=0)), last + 1, step)]

"""Figures with one mark a layer: gaps, ranks and spectra along a network of up to some 150 layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orca_rank.measuring.records import Gap, Layer, Spectrum
from orca_rank.report.canvas import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    LETTER,
    PAGE,
    SKY,
    VERMILLION,
    Number,
    grid,
    sheet,
    styled,
    words,
)

SIGNIFICANT = 0.05
_BLOCK = re.compile(r"^(?:(?:layers|stages)\.(\d+)\.)?blocks\.(\d+)\.(.+)$")
_LABELLED = 170  # positions that still get a label each


@dataclass(frozen=True)
class Place:
    """Where a layer stands on the x axis.

    Args:
        names: the layers drawn here. block: e.g. "2.17" (stage 2, block 17). kind: e.g. "fc1". x: position.
    """

    names: tuple[str, ...]
    block: str
    kind: str
    x: float = 0.0

    @property
    def stage(self) -> str:
        return self.block.rpartition(".")[0]


def place_of(name: str) -> Place:
    """Block and kind of a timm module name; a name without blocks is a block of its own."""
    if match := _BLOCK.match(name):
        stage, block, rest = match.groups()
        return Place((name,), f"{stage}.{block}" if stage is not None else block, rest.rpartition(".")[2])
    parent, _, kind = name.rpartition(".")
    return Place((name,), parent, kind)


def places(names: Sequence[str], same: Mapping[str, Any] | None = None) -> list[Place]:
    """The layers along x in network order, with a space between blocks.

    Args:
        names: layer names in network order.
        same: name -> value; neighbours q, k, v of one block with equal values share a place.
    """
    result: list[Place] = []
    for name in names:
        new = place_of(name)
        last = result[-1] if result else None
        if last is None:
            result.append(new)
        elif same is not None and new.block == last.block and _is_qkv(last, new) and same[name] == same[last.names[0]]:
            result[-1] = replace(last, names=(*last.names, name), kind=f"{last.kind} {new.kind}")
        else:
            result.append(replace(new, x=last.x + (1.0 if new.block == last.block else 1.8)))
    return result


def _is_qkv(last: Place, new: Place) -> bool:
    return set(last.kind.split()) | {new.kind} <= {"q", "k", "v"}


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


def significant(gap: Gap) -> bool:
    """Whether the gap's p-value, for all layers together where that is known, is below 0.05."""
    p = gap.p if gap.p_family is None else gap.p_family
    return p is not None and p < SIGNIFICANT


@styled()
def rank_figure(plans: Mapping[str, Mapping[str, int]], gap: Mapping[str, Number], metric: str = "") -> Figure:
    """Rank per layer in network order, one panel a plan, with the gap drawn over it on a second axis.

    Args:
        plans: title -> {layer: rank}; layers in network order. gap: {layer: gap}; may be empty. metric: its name.
    """
    names = list(dict.fromkeys(name for ranks in plans.values() for name in ranks))
    along = places(names)
    figure, axes = _panels(along, len(plans), 1.55)
    shared: tuple[list[Any], list[Any]] = ([], [])
    for axis, (title, ranks) in zip(axes, plans.items(), strict=True):
        shown = [(place.x, ranks[place.names[0]]) for place in along if place.names[0] in ranks]
        bars = [[(x - 0.41, 0), (x - 0.41, rank), (x + 0.41, rank), (x + 0.41, 0)] for x, rank in shown]
        axis.add_collection(PolyCollection(bars, color=SKY, linewidth=0, label="rank (left)"))
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set(ylabel="rank", ylim=(0, 1.15 * max(1, *(rank for _, rank in shown))))
        axis.set_title(title, pad=18 if axis is axes[0] else 6)
        if gap:
            other = axis.twinx()
            other.grid(visible=False)
            other.spines["right"].set(visible=True, color=VERMILLION)
            other.tick_params(axis="y", colors=VERMILLION)
            points = [(place.x, gap[place.names[0]]) for place in along if place.names[0] in gap]
            label = f"{words(metric)} gap (right)"
            other.plot(
                *zip(*points, strict=True), color=VERMILLION, marker="o", markersize=3, linewidth=0.9, label=label
            )
            top = max(value for _, value in points)
            other.set_ylim(min(0.0, 1.1 * min(value for _, value in points)), 1.15 * top if top > 0 else 1.0)
            other.set_ylabel("gap (no unit)", color=VERMILLION)
            shared = other.get_legend_handles_labels()
    _layer_axis(axes, along)
    handles, labels = axes[0].get_legend_handles_labels()
    _top_legend(figure, handles + shared[0], labels + shared[1])
    return figure


@styled()
def spectra_figure(spectra: Mapping[str, Spectrum], title: str, columns: int = 6) -> Figure:
    """Singular values of every layer against their null line, small panels in network order.

    q, k and v share a panel where their spectra are equal.

    Args:
        spectra: by layer. title: what they are of. columns: panels a row.
    """
    along = places(list(spectra), spectra)
    wide, tall, left, top = 1.55, 0.85, 0.1, 0.75  # of a panel, and where the first one starts
    rows = -(-len(along) // columns)
    figure, axis = sheet(left + columns * (wide + 0.2), top + rows * (tall + 0.5))
    curves, fills, nulls = [], [], []
    for number, place in enumerate(along):
        spectrum = spectra[place.names[0]]
        values, null = np.array(spectrum.singular_values), spectrum.null
        above = int((values > null).sum()) if null is not None else 0
        x0, y0 = left + number % columns * (wide + 0.2), top + number // columns * (tall + 0.5) + tall
        x = x0 + wide * (np.arange(len(values)) + 0.5) / len(values)
        high = 1.05 * max(float(values[0]), null or 0.0) or 1.0
        y = y0 - tall * values / high
        curves.append(np.stack([x, y], 1))
        if null is not None:
            nulls.append([(x0, y0 - tall * null / high), (x0 + wide, y0 - tall * null / high)])
            fills.append([(x[0], y0), *zip(x[:above], y[:above], strict=True), (x[max(above, 1) - 1], y0)])
        count = f": {above} above" if null is not None else ""
        axis.text(x0, y0 - tall - 0.08, f"{place.block} {place.kind}{count}", fontsize=7.5)
        axis.text(x0 + wide, y0 - tall - 0.08, f"{values[0]:.3g}", fontsize=6.5, ha="right", color=GREY)
        axis.text(x0 + wide, y0 + 0.12, str(len(values)), fontsize=6.5, ha="right", color=GREY)
    axis.add_collection(PolyCollection(fills, color=SKY, alpha=0.5, linewidth=0))
    axis.add_collection(LineCollection(curves, color=BLUE, linewidth=1.1))
    axis.add_collection(LineCollection(nulls, color=VERMILLION, linewidth=1.1, linestyle="--"))
    axis.text(left, 0.2, title, fontsize=10, fontweight="bold")
    note = "each panel from 0 to the largest value (its right upper corner) and over all values (their number below)"
    axis.text(left, 0.38, note, fontsize=8.5)
    return figure


@styled()
def agreement_figure(matrix: Mapping[str, Mapping[str, Number]]) -> Figure:
    """Rank correlations between everything that gives one number a layer, as a coloured table.

    Args:
        matrix: name -> name -> Spearman's ρ.
    """
    labels = [words(name) for name in matrix]
    size = 0.62 * len(labels)
    room = LETTER * max(len(label) for label in labels)
    figure, ((axis,),) = grid([size], [size], left=0.3 + room, right=1.2, top=0.15, bottom=0.3 + 0.7 * room)
    values = np.array([[matrix[row].get(column, np.nan) for column in matrix] for row in matrix])
    image = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 else INK
        axis.annotate(f"{value:+.2f}", (column, row), ha="center", va="center", fontsize=7.5, color=colour)
    axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(labels)), labels)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    place, wide = axis.get_position(), figure.get_size_inches()[0]
    bar = figure.add_axes((place.x1 + 0.2 / wide, place.y0 + 0.1 * place.height, 0.16 / wide, 0.8 * place.height))
    figure.colorbar(image, cax=bar, label="Spearman's ρ over layers")
    return figure


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

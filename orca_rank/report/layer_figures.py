"""Figures with one mark a layer: gaps, ranks and spectra along a network of up to some 150 layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orca_rank.report.figures import BLUE, COLOURS, GREY, INK, SKY, VERMILLION, Number, styled, words

SIGNIFICANT = 0.05
_BLOCK = re.compile(r"^(?:(?:layers|stages)\.(\d+)\.)?blocks\.(\d+)\.(.+)$")
_LABELLED = 170  # positions that still get a label each

Record = Mapping[str, Any]


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
def gap_figure(targets: Mapping[str, Sequence[Record]]) -> Figure:
    """Calibrated gap per layer in network order, one panel a metric, all targets side by side.

    Bars are intervals, the line at 0 is what no difference would give, filled marks have p < 0.05 (`p_family`, for all
    layers together, where it is known).

    Args:
        targets: name of the target -> layer records with `name` and `gap: {metric: {"value", "low", "high", "p"}}`.
            Layers stand in the order of the first target; q, k and v share a mark where all their gaps are equal.
    """
    gaps = {target: {record["name"]: record["gap"] for record in records} for target, records in targets.items()}
    names = [record["name"] for record in next(iter(targets.values()))]
    metrics = list(dict.fromkeys(metric for by_name in gaps.values() for gap in by_name.values() for metric in gap))
    along = places(names, {name: [by_name.get(name) for by_name in gaps.values()] for name in names})
    figure, axes = _panels(along, len(metrics), 2.35)
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
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return figure


def _gap_marks(axis: Axes, rows: Sequence[tuple[float, Record]], colour: str, marker: str, label: str) -> None:
    for x, gap in rows:
        if gap.get("low") is not None and gap.get("high") is not None:
            axis.plot([x, x], [gap["low"], gap["high"]], color=colour, linewidth=1.6, alpha=0.55)
    for filled in (True, False):
        points = [(x, gap["value"]) for x, gap in rows if significant(gap) == filled]
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


def significant(gap: Record) -> bool:
    """Whether the gap's p-value, for all layers together where that is known, is below 0.05."""
    p = gap.get("p_family") if gap.get("p_family") is not None else gap.get("p")
    return p is not None and p < SIGNIFICANT


@styled()
def rank_figure(plans: Mapping[str, Mapping[str, int]], gap: Mapping[str, Number], metric: str = "") -> Figure:
    """Rank per layer in network order, one panel a plan, with the gap drawn over it on a second axis.

    Args:
        plans: title -> {layer: rank}; layers in network order. gap: {layer: gap}; may be empty. metric: its name.
    """
    names = list(dict.fromkeys(name for ranks in plans.values() for name in ranks))
    along = places(names)
    figure, axes = _panels(along, len(plans), 2.1)
    for axis, (title, ranks) in zip(axes, plans.items(), strict=True):
        shown = [(place.x, ranks[place.names[0]]) for place in along if place.names[0] in ranks]
        axis.bar([x for x, _ in shown], [rank for _, rank in shown], width=0.82, color=SKY, label="rank (left)")
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
    _layer_axis(axes, along)
    handles, labels = axes[0].get_legend_handles_labels()
    if gap:
        more = other.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    return figure


@styled()
def spectra_figure(
    spectra: Mapping[str, tuple[Sequence[Number], Number | None]], title: str, columns: int = 6
) -> Figure:
    """Singular values of every layer against their null line, small panels in network order.

    q, k and v share a panel where their spectra are equal.

    Args:
        spectra: layer -> (values from large to small, null threshold or None). title: what they are of.
        columns: panels a row.
    """
    along = places(list(spectra), spectra)
    rows = -(-len(along) // columns)
    figure = Figure(figsize=(11.0, 1.45 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for place, axis in zip(along, panels, strict=False):
        values, null = spectra[place.names[0]]
        index = np.arange(1, len(values) + 1)
        above = np.asarray(values) > (null if null is not None else np.inf)
        axis.plot(index, values, color=BLUE, linewidth=1.1)
        axis.fill_between(index, 0, values, where=above.tolist(), color=SKY, alpha=0.5, linewidth=0)
        if null is not None:
            axis.axhline(null, color=VERMILLION, linewidth=1.1, linestyle="--")
        count = f": {int(above.sum())} above" if null is not None else ""
        axis.set_title(f"{place.block} {place.kind}{count}", fontsize=7.5, fontweight="normal")
        axis.tick_params(labelsize=6.5)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(2))
    for axis in list(panels):
        axis.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    figure.supxlabel("number of the singular value", fontsize=8.5)
    return figure


@styled()
def agreement_figure(matrix: Mapping[str, Mapping[str, Number]]) -> Figure:
    """Rank correlations between everything that gives one number a layer, as a coloured table.

    Args:
        matrix: name -> name -> Spearman's ρ.
    """
    names = list(matrix)
    size = 0.62 * len(names)
    figure = Figure(figsize=(size + 3.4, size + 1.5), layout="constrained")
    axis = figure.subplots()
    values = np.array([[matrix[row].get(column, np.nan) for column in names] for row in names])
    image = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 else INK
        axis.annotate(f"{value:+.2f}", (column, row), ha="center", va="center", fontsize=7.5, color=colour)
    labels = [words(name) for name in names]
    axis.set_xticks(range(len(names)), labels, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), labels)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.colorbar(image, ax=axis, label="Spearman's ρ over layers", shrink=0.8)
    return figure


def _panels(along: Sequence[Place], count: int, height: float) -> tuple[Figure, list[Axes]]:
    width = min(19.0, max(8.5, 0.115 * (along[-1].x + 8)))
    figure = Figure(figsize=(width, height * count + 1.0), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    return figure, list(axes)


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
        axis.set_xlim(along[0].x - 0.9, along[-1].x + 0.9)
    top = axes[0].secondary_xaxis("top")
    top.set_xticks([float(np.mean(spans[block])) for block in blocks], blocks, fontsize=7.5)
    top.tick_params(length=0)
    top.spines["top"].set_visible(False)
    if len(along) <= _LABELLED:
        kinds = [place.kind for place in along]
        axes[-1].set_xticks([place.x for place in along], kinds, rotation=90, fontsize=8 if len(along) <= 60 else 6.5)
        axes[-1].set_xlabel("layers in network order; above: stage.block")
    else:
        axes[-1].set_xticks([])
        axes[-1].set_xlabel("layers in network order, without labels; above: stage.block")

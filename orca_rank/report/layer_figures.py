"""Figures with one mark a layer: gaps above ranks, plans as tables of blocks, spectra, posteriors, agreement."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from orca_rank.measuring.records import Gap, Layer, Spectrum
from orca_rank.report.draw import COLOURS, LETTER, SHAPES, Number, Panel, Picture, Scale, scale, short, words

SIGNIFICANT = 0.05
_BLOCK = re.compile(r"^(?:(?:layers|stages)\.(\d+)\.)?blocks\.(\d+)\.(.+)$")
_STEP, _LEFT = 15.0, 66.0  # pixels between layers, and left of the first
_POINTS = 96  # of a spectrum that are drawn


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


def significant(gap: Gap) -> bool:
    """Whether the gap's p-value, for all layers together where that is known, is below 0.05."""
    p = gap.p if gap.p_family is None else gap.p_family
    return p is not None and p < SIGNIFICANT


def gap_figure(
    targets: Mapping[str, Sequence[Layer]], metric: str, plans: Mapping[str, Mapping[str, int]], even: Number | None
) -> Picture:
    """Calibrated gap per layer above the ranks of every plan, on one axis of layers in network order.

    Upright lines are intervals, the line at 0 is what no difference would give, filled marks have p < 0.05 (`p_family`,
    for all layers together, where it is known).

    Args:
        targets: name of the target -> its layers, in the order of the first target. metric: of the gaps.
        plans: title -> layer -> rank. even: the rank that costs as much as the first plan if all layers have it.
    """
    gaps = {target: {layer.name: layer.gap.get(metric) for layer in layers} for target, layers in targets.items()}
    names = [layer.name for layer in next(iter(targets.values()), ())] or list(next(iter(plans.values())))
    along = places(names)
    tall, low = 210.0 if gaps else 0.0, 92.0
    top = 62.0
    draw = Picture(max(640.0, _LEFT + _STEP * (along[-1].x + 2) + 20), top + tall + (low + 34) * len(plans) + 64)
    across = Scale(-1, along[-1].x + 1, _LEFT, _LEFT + _STEP * (along[-1].x + 2))
    foot = draw.height - 64
    _blocks(draw, along, across, top, foot)
    if gaps:
        _gap_panel(draw, across, top, top + tall - 12, gaps, along)
    for number, (title, ranks) in enumerate(plans.items()):
        start = top + tall + (low + 34) * number + 26
        most = max([1.0, even or 0.0, *map(float, ranks.values())])
        panel = Panel(draw, across, Scale(0, 1.08 * most, start + low, start))
        panel.frame(title=title, y="rank", x_ticks=(), y_ticks=_whole(most))
        for place in along:
            rank = ranks.get(place.names[0], 0)
            x, y = panel.point(place.x, rank)
            draw.box(x - 5, y - (1 if rank == 0 else 0), 10, max(1.0, start + low - y), "bar c5",
                     f"{place.names[0]}: rank {rank}")  # fmt: skip
        if even is not None:
            panel.line([(across.low, even), (across.high, even)], "dash fine c1", f"uniform at as many: {even:.2f}")
    for place in along:
        draw.text(across(place.x) + 4, foot + 8, place.kind, "small", at="end", turn=-90)
    draw.text(_LEFT, draw.height - 4, "layers in network order; above: stage.block", "small soft")
    return draw


def _gap_panel(
    draw: Picture, across: Scale, top: Number, foot: Number,
    gaps: Mapping[str, Mapping[str, Gap | None]], along: Sequence[Place],
) -> None:  # fmt: skip
    known = [gap for by_name in gaps.values() for gap in by_name.values() if gap is not None]
    ends = [one for gap in known for one in (gap.value, gap.low, gap.high) if one is not None]
    panel = Panel(draw, across, scale([0.0, *ends], foot, top, zero=True))
    panel.frame(y="gap (no unit)", x_ticks=())
    draw.line([panel.point(across.low, 0), panel.point(across.high, 0)], "fine", "no difference")
    entries = [(SHAPES[i % 5], f"dot c{i % COLOURS}", name) for i, name in enumerate(gaps)]
    draw.legend(_LEFT - 8, 14, [*entries, ("o", "dot c6", f"p < {SIGNIFICANT:g}"), ("o", "ring c6", "not")])
    for number, (target, by_name) in enumerate(gaps.items()):
        colour, shift = f"c{number % COLOURS}", 0.24 * (number - (len(gaps) - 1) / 2)
        for place in along:
            gap = by_name.get(place.names[0])
            if gap is None:
                continue
            panel.span(place.x + shift, gap.low, gap.high, colour)
            kind = "dot" if significant(gap) else "ring"
            panel.mark(place.x + shift, gap.value, f"{kind} {colour}", f"{place.names[0]}, {target}: {_gap_text(gap)}",
                       size=3.6, shape=SHAPES[number % 5])  # fmt: skip


def _gap_text(gap: Gap) -> str:
    ends = "" if gap.low is None or gap.high is None else f" [{gap.low:.3g}, {gap.high:.3g}]"
    p = gap.p if gap.p_family is None else gap.p_family
    return f"{gap.value:.3g}{ends}" + ("" if p is None else f", p = {p:.2g}")


def _blocks(draw: Picture, along: Sequence[Place], across: Scale, top: Number, foot: Number) -> None:
    """Names of blocks above; every second stage (or block, where there are no stages) shaded."""
    blocks = list(dict.fromkeys(place.block for place in along))
    stages = list(dict.fromkeys(block.rpartition(".")[0] for block in blocks))
    for number, block in enumerate(blocks):
        own = [place.x for place in along if place.block == block]
        order = stages.index(block.rpartition(".")[0]) if len(stages) > 1 else number
        left, right = across(own[0] - 0.9), across(own[-1] + 0.9)
        if order % 2 == 0:
            draw.box(left, top - 4, right - left, foot - top + 4, "band")
        draw.text((left + right) / 2, top - 10, block, "small soft", at="middle")


def _whole(most: Number) -> list[tuple[Number, str]]:
    step = max(1, round(most / 4))
    return [(float(rank), str(rank)) for rank in range(0, int(most) + 1, step)]


def table_figure(columns: Mapping[str, Mapping[str, Number]], colours: Mapping[str, str]) -> Picture:
    """Values of layers as tables of block × kind of layer beside each other; strong colours are large.

    Args:
        columns: title -> layer -> value, at least 0 where it is shaded. colours: title -> a name; tables of one name
            share a colour and a scale.
    """
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    along = [place_of(name) for name in names]
    blocks, kinds = (list(dict.fromkeys(getattr(one, what) for one in along)) for what in ("block", "kind"))
    left = 18 + LETTER * max(map(len, blocks))
    wide = 34 if len(columns) < 4 else 28
    each = max(left + wide * len(kinds) + 26, left + 16 + 7.9 * max(map(len, columns)) - 18)
    row = max(1, min(len(columns), int(1040 // each)))
    tall = 64 + 20 * len(blocks)
    draw = Picture(each * row, tall * -(-len(columns) // row))
    scales = list(dict.fromkeys(colours.values()))
    for number, (title, values) in enumerate(columns.items()):
        x0, y0 = each * (number % row) + left, tall * (number // row) + 44
        shared = [v for other, found in columns.items() if colours[other] == colours[title] for v in found.values()]
        most = max([1e-12, *shared])
        draw.text(x0, y0 - 26, title, "head")
        for place, kind in enumerate(kinds):
            draw.text(x0 + wide * (place + 0.5), y0 - 8, kind, "small soft", at="middle")
        for place, block in enumerate(blocks):
            draw.text(x0 - 8, y0 + 20 * place + 14, block, "small soft", at="end")
        for name, value in values.items():
            one = place_of(name)
            x, y = x0 + wide * kinds.index(one.kind), y0 + 20 * blocks.index(one.block)
            shade = max(0.0, min(1.0, value / most))
            draw.box(x, y, wide, 20, f"cell c{(0, 1)[scales.index(colours[title]) % 2]}", f"{name}: {value:.3g}",
                     shade=0.03 + 0.92 * shade)  # fmt: skip
            inside = " inside" if shade > 0.6 else ""
            draw.text(x + wide / 2, y + 14, short(round(value, 1)), f"small{inside}", at="middle")
    return draw


def spectra_figure(spectra: Mapping[str, Spectrum], columns: int = 6) -> Picture:
    """Singular values of every layer against their null line, small panels, each from 0 to its largest.

    q, k and v share a panel where their spectra are equal.
    """
    along = places(list(spectra), spectra)
    wide, tall = 150, 84
    draw = Picture(10 + columns * (wide + 18), 8 + -(-len(along) // columns) * (tall + 44))
    for number, place in enumerate(along):
        spectrum = spectra[place.names[0]]
        values, null = spectrum.singular_values, spectrum.null
        x0, y0 = 10 + number % columns * (wide + 18), 26 + number // columns * (tall + 44)
        across = Scale(0, max(1, len(values)), x0, x0 + wide)
        up = Scale(0, 1.05 * max(values[0], null or 0.0) or 1.0, y0 + tall, y0)
        count = "" if spectrum.rank is None else f": {spectrum.rank} above"
        say = f"{place.names[0]}: {len(values)} values, largest {values[0]:.3g}" + (
            "" if null is None else f", noise reaches {null:.3g}, {spectrum.rank} lie above"
        )
        draw.box(x0, y0, wide, tall, "band", say)
        drawn = sorted({round(i) for i in np.linspace(0, len(values) - 1, min(_POINTS, len(values)))})
        draw.line([(across(i + 0.5), up(values[i])) for i in drawn], "c0")
        if null is not None:
            draw.line([(x0, up(null)), (x0 + wide, up(null))], "dash fine c1")
        draw.text(x0, y0 - 7, f"{place.block} {place.kind}{count}", "small")
        draw.text(x0 + wide, y0 - 7, short(values[0]), "small soft", at="end")
    return draw


def agreement_figure(matrix: Mapping[str, Mapping[str, Number]]) -> Picture:
    """Rank correlations between everything that gives one number a layer, as a coloured table.

    Args:
        matrix: name -> name -> Spearman's ρ.
    """
    labels, size = [words(name) for name in matrix], 44
    room = 16 + LETTER * max(map(len, labels))
    draw = Picture(room + size * len(labels) + 0.75 * room, 0.7 * room + 24 * len(labels) + 8)
    top = 0.7 * room
    for row, name in enumerate(matrix):
        draw.text(room - 8, top + 24 * row + 16, labels[row], at="end")
        draw.text(room + size * (row + 0.4), top - 8, labels[row], turn=-38)
        for column, other in enumerate(matrix):
            value = matrix[name].get(other, float("nan"))
            known = value == value
            draw.box(room + size * column, top + 24 * row, size, 24, f"cell c{0 if value > 0 else 1}",
                     f"{labels[row]} and {labels[column]}: ρ = {value:+.2f}",
                     shade=0.9 * abs(value) if known else 0)  # fmt: skip
            inside = " inside" if known and abs(value) > 0.6 else ""
            draw.text(room + size * (column + 0.5), top + 24 * row + 16, f"{value:+.2f}" if known else "",
                      f"small{inside}", at="middle")  # fmt: skip
    return draw


def posterior_figure(posterior: Mapping[str, Float[np.ndarray, " ranks"]], ranks: Sequence[int]) -> Picture:
    """P(rank | held-out losses) of every layer, a column a layer in network order; strong colours are probable."""
    along = places(list(posterior))
    across = Scale(-1, along[-1].x + 1, _LEFT, _LEFT + _STEP * (along[-1].x + 2))
    tall = max(12.0, min(26.0, 260 / len(ranks)))
    top, foot = 34.0, 34.0 + tall * len(ranks)
    draw = Picture(max(420.0, across.end + 20), foot + 66)
    _blocks(draw, along, across, top, foot)
    for number, rank in enumerate(ranks):
        draw.text(_LEFT - 8, foot - tall * (number + 0.5) + 4, str(rank), "small", at="end")
    draw.text(16, (top + foot) / 2, "rank", at="middle", turn=-90)
    for place in along:
        for number, (rank, probability) in enumerate(zip(ranks, posterior[place.names[0]], strict=True)):
            draw.box(across(place.x) - 7, foot - tall * (number + 1), 14, tall, "cell c0",
                     f"{place.names[0]}, rank {rank}: P = {probability:.2g}",
                     shade=float(probability))  # fmt: skip
        draw.text(across(place.x) + 4, foot + 8, place.kind, "small", at="end", turn=-90)
    draw.text(_LEFT, draw.height - 4, "layers in network order; above: stage.block", "small soft")
    return draw

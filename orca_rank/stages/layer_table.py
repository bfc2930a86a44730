"""Tables with a row a layer, as stage=measure and stage=plan print them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.table import Table

from orca_rank.measuring.options import VARIANTS
from orca_rank.measuring.records import Gap, Layer

WIDE = 110  # columns of a terminal that has room for every column


def grouped(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Rows of a table: q, k and v of one matrix together, under names without what every name repeats."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        parent, _, part = layer.name.rpartition(".")
        name = f"{parent} (q k v)" if part in ("q", "k", "v") else layer.name
        groups.setdefault(re.sub(r"\b(layers|blocks)\.", "", name), []).append(layer)
    return groups


def nulls(layers: Sequence[Layer]) -> list[str]:
    """The spectra that have a noise floor."""
    return [kind for kind in ("ot_map", "gradient") if kind in layers[0].spectra]


def gap_table(layers: Sequence[Layer], width: int) -> Table:
    """Gaps, how many directions stand above their noise floor, and a bar as long as the first gap."""
    metrics = list(dict.fromkeys(metric for layer in layers for metric in layer.gap))
    wide, kinds = width >= WIDE, nulls(layers)
    shown = [metric for metric in metrics if not metric.endswith(tuple(VARIANTS))] if wide else metrics[:1]
    shaped = wide or not kinds
    table = Table()
    for title in ("layer", *(["d_in × d_out"] if shaped else []), *shown, *kinds, "gap"):
        table.add_column(title, justify="left" if title in ("layer", "gap") else "right", no_wrap=True)
    largest = max(layer.gap[shown[0]].value for layer in layers)
    for name, members in grouped(layers).items():
        first = members[0]
        share = first.gap[shown[0]].value / largest if largest > 0 else 0.0
        counts = [" ".join(str(member.spectra[kind].rank) for member in members) for kind in kinds]
        shape = [f"{first.d_in} × {first.d_out}"] if shaped else []
        values = [_starred(first.gap[metric]) for metric in shown]
        table.add_row(name, *shape, *values, *counts, "█" * round(10 * max(share, 0)))
    return table


def plan_tables(
    layers: Sequence[Layer], chosen: Mapping[str, int], others: Mapping[str, Mapping[str, int]], width: int
) -> list[Table]:
    """The chosen ranks and those of further rules, in as many tables as the width asks for."""
    tables: list[dict[str, Mapping[str, int]]] = [{}]
    names = max(map(len, grouped(layers)))
    left = room = width - 29 - names - _column(layers, "rank", chosen)  # what the other columns leave to further rules
    for name, plan in others.items():
        column = _column(layers, name, plan)
        if tables[-1] and column > left:
            tables, left = [*tables, {}], room
        tables[-1][name] = plan
        left -= column
    return [_plan_table(layers, chosen, table, not table or width >= WIDE) for table in tables]


def _column(layers: Sequence[Layer], title: str, plan: Mapping[str, int]) -> int:
    """The width of a column of ranks, its border and padding included."""
    ranks = (" ".join(str(plan[layer.name]) for layer in members) for members in grouped(layers).values())
    spent = f"{sum(plan[layer.name] * layer.cost for layer in layers):,}"
    return 3 + max(map(len, (title, spent, *ranks)))


def _plan_table(
    layers: Sequence[Layer], chosen: Mapping[str, int], others: Mapping[str, Mapping[str, int]], shaped: bool
) -> Table:
    metric = next((name for layer in layers for name in layer.gap), None)
    titles = [*(["d_in × d_out"] if shaped else []), *([f"gap ({metric})"] if metric else []), "rank", *others]
    table = Table("layer", *titles, "parameters")
    for column in table.columns:
        column.no_wrap, column.justify = True, "left" if column.header == "layer" else "right"
    for name, members in grouped(layers).items():
        first = members[0]
        gap = [f"{first.gap[metric].value:.3g}"] if metric else []
        columns = [" ".join(str(plan[layer.name]) for layer in members) for plan in (chosen, *others.values())]
        parameters = sum(chosen[layer.name] * layer.cost for layer in members)
        shape = [f"{first.d_in} × {first.d_out}"] if shaped else []
        table.add_row(name, *shape, *gap, *columns, f"{parameters:,}")
    if others:
        spent = [f"{sum(plan[layer.name] * layer.cost for layer in layers):,}" for plan in (chosen, *others.values())]
        table.add_section()
        table.add_row("parameters", *[""] * (len(titles) - 1 - len(others)), *spent, "")
    return table


def _starred(gap: Gap) -> str:
    return f"{gap.value:.3g}" + ("*" if gap.p_family is not None and gap.p_family < 0.05 else " ")

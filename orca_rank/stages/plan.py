"""stage=plan: which ranks, and how many parameters, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from orca_rank import ranks
from orca_rank.artifacts.files import write_json
from orca_rank.artifacts.provenance import select
from orca_rank.build import build
from orca_rank.ranks import Layer, RankPlan
from orca_rank.stages.planning import budget_of, grouped, layers_of, make_plan
from orca_rank.stages.setup import bare_model, outline, stage_folder
from orca_rank.stages.trainable import adapter_module, count_parameters, make_trainable

console = Console()


def run(config: DictConfig) -> None:
    """Apply the rank rule, count every parameter, print the table and write plan/plan.json.

    `plan.rules` names further rules to show beside it, with their default options at the same budget. Needs no
    weights; needs data only where the data config cannot tell its shapes, and stage=measure only where a rule reads
    measurements.

    Raises:
        ValueError: a rule that cannot be applied, or a name in plan.rules that is no rule.
    """
    model = bare_model(config, outline(build(config.data)))
    layers = layers_of(config, model.body)
    adapters = config.adapter.method == "inject"
    measured = stage_folder(config, "measure") / "layers.json"
    plan = _plan(config, layers, measured) if adapters else None
    others = _other_rules(config, layers) if adapters else {}
    make_trainable(model, config, plan, adapter_module(config, layers) if adapters else None)
    counts = count_parameters(model, adapters)
    chosen = plan.ranks if plan is not None else {layer.name: 0 for layer in layers}
    rows = [
        {
            "name": layer.name,
            "d_in": layer.d_in,
            "d_out": layer.d_out,
            "rank": chosen[layer.name],
            "parameters": chosen[layer.name] * layer.cost,
        }
        for layer in layers
    ]
    made_from = select(
        config, "data", "backbone", "layers", "embedder", "predictor", "adapter", "rank", "budget", "plan"
    )
    path = stage_folder(config, "plan") / "plan.json"
    payload = {**counts, "rule": plan.rule if plan is not None else None, "layers": rows, "rules": others}
    write_json(path, payload, config=made_from, inputs=[measured] if measured.exists() else [])
    _print(layers, rows, others, counts)
    console.print(f"written to {path}", soft_wrap=True)


def _plan(config: DictConfig, layers: Sequence[Layer], measured: Path) -> RankPlan:
    """The configured rule's plan; before anything is measured, a uniform one of the same budget, and said so."""
    try:
        return make_plan(config, layers)
    except ranks.MissingMeasurement as error:
        if measured.exists():
            raise
        console.print(
            f"nothing is measured yet, so this is rank=uniform at the same budget: {error}",
            soft_wrap=True,
            markup=False,
        )
        return ranks.uniform(layers, budget_of(config)).check(layers)


def _other_rules(config: DictConfig, layers: Sequence[Layer]) -> dict[str, dict[str, int]]:
    budget, layers = budget_of(config), ranks.averaged(layers, config.layers.group)
    plans = {}
    for name in config.plan.rules:
        if name not in ranks.RULES:
            raise ValueError(f"plan.rules names {name!r}; the rules are {', '.join(ranks.RULES)}")
        try:
            plans[name] = dict(ranks.RULES[name](layers, budget).ranks)
        except ValueError as error:
            console.print(f"{name} is left out: {error}", soft_wrap=True, markup=False)
    return plans


def _print(
    layers: Sequence[Layer],
    rows: Sequence[Mapping[str, Any]],
    others: Mapping[str, Mapping[str, int]],
    counts: Mapping[str, Any],
) -> None:
    chosen = {row["name"]: row["rank"] for row in rows}
    tables: list[dict[str, Mapping[str, int]]] = [{}]
    left = room = console.width - 57  # what the other columns leave to further rules
    for name, plan in others.items():
        width = max(len(name), 8) + 3
        if tables[-1] and width > left:
            tables, left = [*tables, {}], room
        tables[-1][name] = plan
        left -= width
    for table in tables:
        console.print(_table(layers, chosen, table))
    trained = counts["trainable_parameters"]
    parts = ", ".join(f"{name} {trained[name]:,}" for name in ("adapter", "embedder", "predictor", "other"))
    console.print(f"trainable: {trained['total']:,} of {counts['total_parameters']:,} parameters ({parts})")


def _table(layers: Sequence[Layer], chosen: Mapping[str, int], others: Mapping[str, Mapping[str, int]]) -> Table:
    """A row a layer; q, k and v of one matrix share a row."""
    metric = next((name for layer in layers for name in layer.gap), None)
    shaped = not others or console.width >= 110
    titles = [*(["d_in × d_out"] if shaped else []), *([f"gap ({metric})"] if metric else []), "rank", *others]
    table = Table("layer", *titles, "parameters")
    for column in table.columns:
        column.no_wrap, column.justify = True, "left" if column.header == "layer" else "right"
    for name, members in grouped(layers).items():
        first = members[0]
        gap = [f"{first.gap[metric]['value']:.3g}"] if metric else []
        columns = [" ".join(str(plan[layer.name]) for layer in members) for plan in (chosen, *others.values())]
        parameters = sum(chosen[layer.name] * layer.cost for layer in members)
        shape = [f"{first.d_in} × {first.d_out}"] if shaped else []
        table.add_row(name, *shape, *gap, *columns, f"{parameters:,}")
    if others:
        spent = [f"{sum(plan[layer.name] * layer.cost for layer in layers):,}" for plan in (chosen, *others.values())]
        table.add_section()
        table.add_row("parameters", *[""] * (len(titles) - 1 - len(others)), *spent, "")
    return table

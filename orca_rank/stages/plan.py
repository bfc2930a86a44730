"""stage=plan: which ranks, and how many parameters, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from orca_rank import ranks
from orca_rank.adapters import inject
from orca_rank.artifacts.command import leave
from orca_rank.artifacts.files import write_json
from orca_rank.artifacts.lock import locked
from orca_rank.artifacts.provenance import plain, select
from orca_rank.build import build
from orca_rank.measuring.layers import placeholder
from orca_rank.ranks import Layer, RankPlan
from orca_rank.stages.layer_table import plan_tables
from orca_rank.stages.planning import budget_of, gap_options, layers_of, make_plan
from orca_rank.stages.setup import bare_layers, bare_model, check_model, outline, stage_folder
from orca_rank.stages.tracking import show
from orca_rank.stages.trainable import adapter_module, count_parameters, in_words, make_trainable, rebuilt
from orca_rank.tracking.pages import plan_page

console = Console(markup=False)


def check_options(config: DictConfig) -> None:
    """Whether the rule and the adapter can be applied to this backbone, without data, weights or measurements.

    Raises:
        ValueError: for a value that means nothing, a rule or an adapter that cannot be applied.
    """
    check_model(config)
    _check_rules(config)
    body, bare = bare_layers(config)
    if config.adapter.method != "inject":
        return
    options = gap_options(config.gap)
    layers = [placeholder(options, layer) for layer in bare]
    plan = make_plan(config, layers)
    adapter = plain(config.adapter)
    module = rebuilt(adapter["module"])  # directions are not there before they are measured
    inject(body, plan, adapter=build(adapter_module({**adapter, "module": module}, layers, Path(), plan)))


def run(config: DictConfig) -> None:
    """Apply the rank rule, count every parameter, print the table and write plan/plan.json.

    `plan.rules` names further rules to show beside it, with their default options at the same budget. Needs no
    weights; needs data only where the data config cannot tell its shapes, and stage=measure only where a rule reads
    measurements.

    Raises:
        ValueError: a rule that cannot be applied, or a name in plan.rules that is no rule.
    """
    check_model(config)
    _check_rules(config)
    model = bare_model(config, outline(build(config.data)))
    layers = layers_of(config, model.body)
    adapters = config.adapter.method == "inject"
    measured = stage_folder(config, "measure") / "layers.json"
    plan = _plan(config, layers, measured) if adapters else None
    others = _other_rules(config, layers) if adapters else {}
    make_trainable(
        model,
        config.adapter.method,
        plan,
        adapter_module(plain(config.adapter), layers, measured.parent, plan) if plan is not None else None,
        embedder=config.embedder.train,
        predictor=not config.predictor.frozen_on_purpose,
    )
    extra = None
    if config.finetune.curriculum is not None:
        from orca_rank.stages.curriculum import beside  # here, because lightning takes seconds

        extra = beside(config, model)
    counts = count_parameters(model, adapters, extra)
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
    if config.finetune.curriculum is not None:
        made_from |= {"curriculum": plain(config.finetune.curriculum), **select(config, "source")}
    path = stage_folder(config, "plan") / "plan.json"
    made = plan.to_dict() if plan is not None else {}
    said = {name: made.get(name) for name in ("rule", "budget", "options", "measurement")}
    payload = {**counts, **said, "layers": rows, "rules": others}
    with locked(path.parent, wait=True):
        leave(path.parent)
        write_json(path, payload, config=made_from, inputs=[measured] if measured.exists() else [])
        show(config, "plan", path.parent, made_from, lambda: plan_page(path.parent.parent))
    _print(layers, chosen, others, counts)
    console.print(f"written to {path}", soft_wrap=True)


def _check_rules(config: DictConfig) -> None:
    if not isinstance(plain(config.plan.rules), list):
        raise ValueError(f"plan.rules={config.plan.rules}: expected a list of rules, such as [uniform], or []")
    for name in config.plan.rules:
        if name not in ranks.RULES:
            raise ValueError(f"plan.rules names {name!r}; the rules are {', '.join(ranks.RULES)}")


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
        )
        return ranks.uniform(layers, budget_of(config.budget)).check(layers)


def _other_rules(config: DictConfig, layers: Sequence[Layer]) -> dict[str, dict[str, int]]:
    budget, layers = budget_of(config.budget), ranks.averaged(layers, config.layers.group)
    plans = {}
    for name in config.plan.rules:
        try:
            plans[name] = dict(ranks.RULES[name](layers, budget).ranks)
        except ValueError as error:
            console.print(f"{name} is left out: {error}", soft_wrap=True)
    return plans


def _print(
    layers: Sequence[Layer],
    chosen: Mapping[str, int],
    others: Mapping[str, Mapping[str, int]],
    counts: Mapping[str, Any],
) -> None:
    for table in plan_tables(layers, chosen, others, console.width):
        console.print(table)
    console.print(in_words(counts))

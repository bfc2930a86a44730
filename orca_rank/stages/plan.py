"""stage=plan: which ranks, and how many parameters, before anything is trained."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from orca_rank.artifacts import select, stage_folder, write_json
from orca_rank.build import build
from orca_rank.ranks import Layer, RankPlan
from orca_rank.stages.parts import bare_model, count_parameters, layers_of, make_plan, make_trainable, outline


def run(config: DictConfig) -> None:
    """Apply the rank rule, count every parameter, print the table and write plan/plan.json.

    Needs no weights; needs data only where the data config cannot tell its shapes, and stage=measure only where the
    rule reads measurements.
    """
    model = bare_model(config, outline(build(config.data)))
    layers = layers_of(config, model.body)
    adapters = config.adapter.method == "inject"
    plan = make_plan(config, layers) if adapters else None
    make_trainable(model, config, plan)
    counts = count_parameters(model, adapters)
    ranks = plan.ranks if plan is not None else {}
    rows = [
        {
            "name": layer.name,
            "d_in": layer.d_in,
            "d_out": layer.d_out,
            "rank": ranks.get(layer.name, 0),
            "parameters": ranks.get(layer.name, 0) * layer.cost,
        }
        for layer in layers
    ]
    path = stage_folder(config, "plan") / "plan.json"
    made_from = select(config, "data", "backbone", "layers", "embedder", "predictor", "adapter", "rank", "budget")
    measured = stage_folder(config, "measure") / "layers.json"
    write_json(path, {**counts, "layers": rows}, config=made_from, inputs=[measured] if measured.exists() else [])
    _print(layers, plan, counts)
    Console().print(f"written to {path}", soft_wrap=True)


def _print(layers: list[Layer], plan: RankPlan | None, counts: dict) -> None:
    metric = next((name for layer in layers for name in layer.gap), None)
    table = Table("layer", "d_in × d_out", *([f"gap ({metric})"] if metric else []), "rank", "parameters")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in layers:
        rank = plan.ranks[layer.name] if plan is not None else 0
        gap = [f"{layer.gap[metric]['value']:.3f}"] if metric else []
        table.add_row(layer.name, f"{layer.d_in} × {layer.d_out}", *gap, str(rank), f"{rank * layer.cost:,}")
    console = Console()
    console.print(table)
    trained = counts["trainable_parameters"]
    parts = ", ".join(f"{name} {trained[name]:,}" for name in ("adapter", "embedder", "predictor", "other"))
    console.print(f"trainable: {trained['total']:,} of {counts['total_parameters']:,} parameters ({parts})")

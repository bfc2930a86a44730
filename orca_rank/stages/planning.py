"""From the layers of a body, and what was measured there, to a rank plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from orca_rank.artifacts.command import command
from orca_rank.artifacts.files import file_hash, read_record
from orca_rank.artifacts.provenance import plain
from orca_rank.build import build
from orca_rank.measuring.matrices import adaptable_layers
from orca_rank.measuring.options import GapOptions
from orca_rank.ranks import Budget, Layer, RankPlan, apply
from orca_rank.stages.setup import stage_folder


def layers_of(config: DictConfig, body: nn.Module) -> list[Layer]:
    """The layers to adapt, with their measurements where stage=measure has made them.

    Raises:
        ValueError: if the run's measurements are of other layers.
    """
    layers = adaptable_layers(body, config.layers.target, config.layers.qkv)
    path = stage_folder(config, "measure") / "layers.json"
    if not path.exists():
        return layers
    measured = {layer.name: layer for layer in read_layers(path)}
    names = {layer.name for layer in layers}
    if names != set(measured):
        raise ValueError(
            f"{path} measured other layers than layers.target={config.layers.target!r} layers.qkv={config.layers.qkv} "
            f"choose (for example {sorted(names ^ set(measured))[:2]}): run "
            f"`{command('stage=measure', 'force=true')}`, or use another run"
        )
    for layer in layers:
        found = measured[layer.name]
        if (found.d_in, found.d_out) != (layer.d_in, layer.d_out):
            raise ValueError(f"{path} was measured on another backbone: {layer.name} has another shape there")
    return [measured[layer.name] for layer in layers]


def read_layers(path: Path) -> list[Layer]:
    """The records of a measure/layers.json."""
    return read_record(path, "stage=measure", lambda payload: [Layer.from_dict(one) for one in payload["layers"]])


def make_plan(config: DictConfig, layers: Sequence[Layer]) -> RankPlan:
    """The configured rule applied to the layers, their measurements shared as layers.group says, under the configured
    budget, checked against them, and with the hash of the measurements where there are any that it may have read."""
    plan = apply(build(config.rank), layers, budget_of(config.budget), config.layers.group)
    path = stage_folder(config, "measure") / "layers.json"
    blind = plan.rule in ("uniform", "from_file") or not path.exists()
    return plan if blind else replace(plan, measurement=file_hash(path))


def gap_options(node: DictConfig) -> GapOptions:
    """What config.gap asks to be measured, its metrics built.

    Raises:
        ValueError: for a value that means nothing.
    """
    return GapOptions.from_dict(plain(node), {name: build(metric) for name, metric in node.metrics.items()})


def budget_of(node: DictConfig) -> Budget | None:
    """The budget of config.budget; None where no limit is set, for rules that know how many ranks they want.

    Raises:
        ValueError: for more than one limit, or bounds without one.
    """
    options = plain(node)
    if any(options[name] is not None for name in ("mean_rank", "total_rank", "parameters")):
        return Budget(**options)
    if options["r_min"] or options["r_max"] is not None:
        raise ValueError(
            f"budget.r_min={options['r_min']} and budget.r_max={options['r_max']} bound the ranks of a budget: set one "
            f"of budget.mean_rank, total_rank and parameters too"
        )
    return None

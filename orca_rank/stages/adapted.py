"""The model with which a fine-tune begins: embedder, body, predictor, and adapters where the plan says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from orca_rank.artifacts.provenance import plain
from orca_rank.backbone import OrcaModel, weights_hash
from orca_rank.measuring.records import Layer
from orca_rank.ranks import RankPlan
from orca_rank.stages.planning import layers_of, make_plan
from orca_rank.stages.setup import build_model, stage_folder
from orca_rank.stages.trainable import adapter_module, audit, make_trainable, probe_adapters
from orca_rank.task import Task


@dataclass(frozen=True)
class Adapted:
    """The model, and what it was made with.

    Args:
        layers: the adaptable ones. plan, adapter: None where nothing is injected. weights: a hash of the bare body's.
    """

    model: OrcaModel
    layers: Sequence[Layer]
    plan: RankPlan | None
    adapter: Mapping[str, Any] | None
    weights: str


def adapted_model(config: DictConfig, task: Task) -> Adapted:
    """Build and adapt the model of a config for a task, and try every adapter on one input.

    Raises:
        ValueError: for a plan, an adapter or a predictor that cannot be trained so. FileNotFoundError: an earlier stage
            is missing.
    """
    model = build_model(config, task)
    weights = weights_hash(model.body)
    injected = config.adapter.method == "inject"
    layers = layers_of(config, model.body)
    plan = make_plan(config, layers) if injected else None
    measured = stage_folder(config, "measure")
    adapter = None if plan is None else adapter_module(plain(config.adapter), layers, measured, plan)
    trained = {"embedder": config.embedder.train, "predictor": not config.predictor.frozen_on_purpose}
    make_trainable(model, config.adapter.method, plan, adapter, **trained)
    audit(model, config.embedder, config.predictor.frozen_on_purpose)
    if injected:
        probe_adapters(model, task.input_shape)
    return Adapted(model, layers, plan, adapter, weights)

"""What several stages put together the same way: data, backbone, model, rank plan, trainable parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from orca_rank.adapters import inject
from orca_rank.artifacts import plain, read_json, read_tensors, select, stage_folder
from orca_rank.backbone import OrcaModel, adaptable_layers, create_model, source_model
from orca_rank.build import build
from orca_rank.ranks import Budget, Layer, RankPlan, averaged
from orca_rank.ranks.ibp import concentration
from orca_rank.ranks.rules import gap_values
from orca_rank.spectra import load_directions
from orca_rank.task import Task

# What a model's weights before fine-tuning depend on.
MODEL_SECTIONS = ("backbone", "embedder", "seed")


def resolve_backbone(config: DictConfig) -> dict[str, Any]:
    """The backbone config with `pretrained` as `backbone.create_timm` reads it: a bool or a path.

    `on_source` pretrains on the run's source data, once, and caches the weights; `shipped` takes the weights that
    come with this package.
    """
    backbone = plain(config.backbone)
    if backbone["pretrained"] == "on_source":
        from orca_rank.stages.pretrain import on_source

        backbone["pretrained"] = str(on_source(config))
    elif backbone["pretrained"] == "shipped":
        from orca_rank.weights import shipped

        backbone["pretrained"] = str(shipped(backbone["shipped"]))
    return backbone


def build_model(config: DictConfig, task: Task) -> OrcaModel:
    """The model before fine-tuning, with the embedder that the config asks for.

    Raises:
        FileNotFoundError: embedder.aligned without a finished stage=align. ValueError: an embedder of another shape.
    """
    torch.manual_seed(config.seed)
    model = create_model(resolve_backbone(config), task, config.embedder.init)
    if config.embedder.aligned:
        path = aligned_embedder(config)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: run `python -m orca_rank stage=align run={config.run}` first, or set "
                f"embedder.aligned=false to use the {config.embedder.init} initialisation"
            )
        state = read_tensors(path, "stage=align")
        try:
            model.embedder.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit this backbone and target ({str(error).splitlines()[-1].strip()}): run "
                f"`python -m orca_rank stage=align run={config.run} force=true`"
            ) from error
    return model


def contents(config: DictConfig, *places: str) -> dict[str, str]:
    """place in the config -> a hash of the files that its data are read from, for those that read any: with the
    options, what a result depends on."""
    found = {place: getattr(build(OmegaConf.select(config, place)), "contents", None) for place in places}
    return {place: value for place, value in found.items() if value is not None}


def source_side(backbone: Mapping[str, Any], seed: int, data: L.LightningDataModule) -> OrcaModel:
    """The pretrained embedder and body that a source passes through; no embedder where its data come as tokens.

    Args:
        backbone: as `resolve_backbone` gives it. seed: of weights that are random, the same in every stage.

    Raises:
        ValueError: if the tokens belong to another backbone.
    """
    torch.manual_seed(seed)
    model = source_model(backbone)
    if getattr(data, "embedded", False):
        data.check(model.embedder, backbone["pretrained"] is not False)
        model.embedder = nn.Identity()
    return model


def outline(data: L.LightningDataModule) -> Task:
    """The task of a data module, without loading the data where the module can tell its shapes beforehand."""
    return getattr(data, "outline", None) or data.task


def data_for(config: DictConfig, task: Task, stage: str) -> L.LightningDataModule:
    """The run's data, set up for "fit" or "test", for a model that was fine-tuned for `task`.

    Raises:
        ValueError: if the data are of another task.
    """
    data = build(config.data)
    data.prepare_data()
    data.setup(stage)
    if (data.task.kind, data.task.output_shape) != (task.kind, task.output_shape):
        raise ValueError(
            f"the model was fine-tuned for {task.kind} {task.output_shape}, the data are "
            f"{data.task.kind} {data.task.output_shape}: choose the data that it was trained on"
        )
    return data


def device_of(config: DictConfig) -> torch.device:
    """Where a stage computes without a Trainer: the GPU, if there is one and trainer.accelerator allows it."""
    wanted = config.trainer.get("accelerator", "auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def aligned_embedder(config: DictConfig) -> Path:
    """Where stage=align leaves the embedder."""
    return stage_folder(config, "align") / "embedder.safetensors"


def bare_model(config: DictConfig, task: Task) -> OrcaModel:
    """The architecture alone, on the meta device: no weights are read, drawn or stored."""
    with torch.device("meta"):
        return create_model({**plain(config.backbone), "pretrained": False}, task, config.embedder.init)


def layers_of(config: DictConfig, body: nn.Module) -> list[Layer]:
    """The layers to adapt, with their measurements where stage=measure has made them.

    Raises:
        ValueError: if the run's measurements are of other layers.
    """
    layers = adaptable_layers(body, config.layers.target, config.layers.qkv)
    path = stage_folder(config, "measure") / "layers.json"
    if not path.exists():
        return layers
    measured = {record["name"]: record for record in read_json(path, "stage=measure")["layers"]}
    names = {layer.name for layer in layers}
    if names != set(measured):
        raise ValueError(
            f"{path} measured other layers than layers.target={config.layers.target!r} layers.qkv={config.layers.qkv} "
            f"choose (for example {sorted(names ^ set(measured))[:2]}): run `python -m orca_rank stage=measure "
            f"run={config.run} force=true`, or use another run"
        )
    for layer in layers:
        record = measured[layer.name]
        if (record["d_in"], record["d_out"]) != (layer.d_in, layer.d_out):
            raise ValueError(f"{path} was measured on another backbone: {layer.name} has another shape there")
    return [Layer.from_dict(measured[layer.name]) for layer in layers]


def grouped(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Rows of a table: q, k and v of one matrix together, under names without what every name repeats."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        parent, _, part = layer.name.rpartition(".")
        name = f"{parent} (q k v)" if part in ("q", "k", "v") else layer.name
        groups.setdefault(re.sub(r"\b(layers|blocks)\.", "", name), []).append(layer)
    return groups


def make_plan(config: DictConfig, layers: list[Layer]) -> RankPlan:
    """The configured rule applied to the layers, their measurements shared as layers.group says, under the configured
    budget, and checked against them."""
    plan = build(config.rank)(averaged(layers, config.layers.group), budget_of(config))
    plan.check(layers)
    return plan


def budget_of(config: DictConfig) -> Budget | None:
    """The configured budget; None where no limit is set, for rules that know how many ranks they want.

    Raises:
        ValueError: for more than one limit, or bounds without one.
    """
    options = plain(config.budget)
    if any(options[name] is not None for name in ("mean_rank", "total_rank", "parameters")):
        return Budget(**options)
    if options["r_min"] or options["r_max"] is not None:
        raise ValueError(
            f"budget.r_min={options['r_min']} and budget.r_max={options['r_max']} bound the ranks of a budget: set one "
            f"of budget.mean_rank, total_rank and parameters too"
        )
    return None


def adapter_module(config: DictConfig, layers: Sequence[Layer]) -> dict[str, Any]:
    """The adapter's module config with what it takes from stage=measure filled in.

    `concentration: gaps` becomes each layer's α_i = mean · (D_i / D̄)^γ of the IBP prior (adapter.prior), and
    `init: directions` reads the leading directions that the measurement adapter.directions found.

    Raises:
        ValueError: if the layers carry no such gap, or no such directions were stored. FileNotFoundError: if none were.
    """
    module = plain(config.adapter.module)
    if module.get("concentration") == "gaps":
        prior = config.adapter.prior
        gaps = gap_values(layers, prior.metric, config.adapter.name)
        alphas = concentration(gaps, prior.mean, prior.gamma).clip(min=0.01 * prior.mean)
        module["concentration"] = {layer.name: float(a) for layer, a in zip(layers, alphas, strict=True)}
    if module.get("init") == "directions":
        stored = stage_folder(config, "measure") / "directions.safetensors"
        module["directions"] = load_directions(stored, config.adapter.directions)
    return module


def make_trainable(
    model: OrcaModel, config: DictConfig, plan: RankPlan | None, adapter: Mapping[str, Any] | None
) -> None:
    """Freeze the model, then free what the config trains: adapter (see `adapter_module`), embedder, predictor.

    Raises:
        ValueError: for an unknown adapter.method.
    """
    method = config.adapter.method
    model.requires_grad_(False)
    if method == "inject":
        inject(model.body, plan, adapter=build(adapter))
    elif method == "full":
        model.body.requires_grad_(True)
    elif method == "norm":
        for module in model.body.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    elif method != "probe":
        raise ValueError(f"adapter.method must be inject, full, norm or probe, received {method!r}")
    model.embedder.requires_grad_(bool(config.embedder.train))
    model.predictor.requires_grad_(not config.predictor.frozen_on_purpose)


def count_parameters(model: OrcaModel, adapters: bool) -> dict[str, Any]:
    """Trainable parameters by part, and the total of all parameters.

    `adapter` counts what was injected into the body, `other` what else of the body is trained.
    """
    parts = {
        name: sum(p.numel() for p in getattr(model, name).parameters() if p.requires_grad)
        for name in ("embedder", "body", "predictor")
    }
    body = parts.pop("body")
    parts |= {"adapter": body if adapters else 0, "other": 0 if adapters else body}
    return {
        "trainable_parameters": {"total": sum(parts.values()), **parts},
        "total_parameters": sum(p.numel() for p in model.parameters()),
    }


def audit(model: OrcaModel, config: DictConfig) -> None:
    """Stop before training when a freshly initialised module is frozen: every rank would look equally bad.

    Raises:
        ValueError: the predictor, or an embedder with random weights, is frozen and no option says so on purpose.
    """
    if not any(p.requires_grad for p in model.predictor.parameters()) and not config.predictor.frozen_on_purpose:
        raise ValueError(
            "the freshly initialised predictor is frozen: train it, or set predictor.frozen_on_purpose=true"
        )
    if config.embedder.init == "random" and not config.embedder.aligned and not config.embedder.train:
        raise ValueError(
            "the embedder has random weights and is frozen: set embedder.train=true, embedder.init=pretrained, or "
            "embedder.aligned=true"
        )


def close_logger(trainer: L.Trainer) -> None:
    """End a tracked run: W&B would give an open one to the next job of a sweep, which shares the process."""
    finish = getattr(getattr(trainer.logger, "experiment", None), "finish", None)
    if finish is not None:
        finish()


def finetune_config(config: DictConfig) -> Mapping[str, Any]:
    """The sections that a fine-tuned model depends on."""
    sections = ["data", "layers", *MODEL_SECTIONS, "predictor", "adapter", "finetune", "trainer"]
    if config.embedder.aligned:
        sections += ["source", "align"]
    if config.adapter.method == "inject":
        sections += ["rank", "budget"]
    return select(config, *sections)

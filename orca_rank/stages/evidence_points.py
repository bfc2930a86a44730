"""The config of one point of the evidence, from the run's config and the point."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from orca_rank.adapters import DyLoRA
from orca_rank.artifacts.provenance import plain, select
from orca_rank.build import build
from orca_rank.evidence.points import FROZEN, FULL, UNIFORM, Point
from orca_rank.evidence.protocol import Protocol
from orca_rank.measuring.matrices import adaptable_layers
from orca_rank.stages import measure
from orca_rank.stages.adapted import adapted_model
from orca_rank.stages.setup import bare_model, outline

# What every fine-tune of a task has in common; what a point chooses itself is not among it.
SECTIONS = ("data", "backbone", "layers", "embedder", "predictor", "adapter", "finetune", "trainer")
MERGED = ("finetune", "embedder", "layers")  # no groups: what a task or arm does not name of them stays
TRAINED, POSTERIOR = "orca_rank.ranks.trained", "orca_rank.ranks.posterior"
OF_SOURCE = ("source", "gap")  # what measuring, aligning and pretraining read beside that


def for_task(config: DictConfig, folder: Path, task: str, options: Mapping[str, Any]) -> DictConfig:
    """The run's config for a task, its run folder being <folder>/<task>, with further options merged in."""
    cache = str(config.paths.cache)
    own = copy.deepcopy(config)
    OmegaConf.set_struct(own, False)
    _take(own, config.evidence.tasks[task])
    own.paths.runs, own.paths.cache, own.run = str(folder), cache, task
    own.embedder.aligned = False
    if "group" in (own.logger or {}):  # the pages of all tasks stand together
        own.logger.group = str(config.run)
    own.merge_with(OmegaConf.create(dict(options)))
    return own


def _take(own: DictConfig, nodes: Mapping[str, Any]) -> None:
    """Groups are replaced; sections that are no groups keep what is not named."""
    for name, node in nodes.items():
        own[name] = OmegaConf.merge(own[name], node) if name in MERGED else copy.deepcopy(node)


def task_options(config: DictConfig, task: str, rule: str) -> dict[str, Any]:
    """What a row of a task and rule, or arm, depends on, as plain values."""
    named = {**config.evidence.rules, **config.evidence.arms}
    own = for_task(config, Path("."), task, {})
    on_source = rule in named or own.backbone.pretrained == "on_source"
    options = select(own, *SECTIONS, *(OF_SOURCE if on_source else ()))
    for section in {"data", "source"} & options.keys():  # where files lie on this machine is nobody else's business
        options[section] = {name: value for name, value in options[section].items() if name not in ("root", "cache")}
    if reads_losses(config, rule):
        options["nested"] = plain(config.evidence.nested)
    if rule in config.evidence.rules:
        options["rule_r_min"] = int(config.evidence.r_min.get(rule, 0))
        if config.evidence.rules[rule]["_target_"] in (TRAINED, POSTERIOR):
            options["rule_learned_at"] = max(config.evidence.gate, default=0)  # the rank of what the rule reads
    return {**options, "rule": plain(named.get(rule))}


def reads_losses(config: DictConfig, rule: str) -> bool:
    """Whether this is a rule that reads the held-out losses of a nested adapter."""
    return rule in config.evidence.rules and config.evidence.rules[rule]["_target_"] == POSTERIOR


def cost_of_one_rank(config: DictConfig, task: str) -> int:
    """Parameters of rank 1 in every layer: Σ (d_in + d_out)."""
    own = for_task(config, Path("."), task, {})
    body = bare_model(own, outline(build(own.data))).body
    return sum(layer.cost for layer in adaptable_layers(body, own.layers.target, own.layers.qkv))


def check_rules(config: DictConfig, folder: Path, protocol: Protocol, costs: Mapping[str, int]) -> None:
    """Try what the rules will need once a task's gate is open, before hours of work lead there.

    Args:
        costs: task -> see `cost_of_one_rank`.

    Raises:
        ValueError: a source that the task's body cannot read, or a rule that needs what is not measured, with the task;
            an r_min of no rule.
    """
    if unknown := sorted({*config.evidence.r_min} - {*protocol.rules}):
        raise ValueError(f"evidence.r_min names {', '.join(unknown)}, which evidence.rules does not have")
    for task in protocol.tasks:
        for rule in protocol.rules:
            try:
                if config.evidence.rules[rule]["_target_"] in (TRAINED, POSTERIOR):  # what they read is learned first
                    measure.check_options(for_task(config, folder, task, {}))
                    if reads_losses(config, rule):
                        _check_nested(config, folder, protocol, task, costs[task])
                else:
                    for rank in protocol.budgets:
                        point = Point("rules", task, rule, rank, 0, 0, 1.0, 1.0)
                        measure.check_options(configured(config, folder, point, costs[task]))
            except ValueError as error:
                raise ValueError(f"evidence.tasks.{task}, rule {rule}: {error}") from error


def _check_nested(config: DictConfig, folder: Path, protocol: Protocol, task: str, cost: int) -> None:
    own = nested_config(config, folder, Point("gate", task, UNIFORM, max(protocol.gate), 0, 0, 1.0, 1.0), cost)
    module = build(own.adapter.module) if own.adapter.method == "inject" else None
    if not (isinstance(module, partial) and isinstance(module.func, type) and issubclass(module.func, DyLoRA)):
        raise ValueError(f"evidence.nested.name={own.adapter.name}: expected an adapter of nested ranks, as dylora")


def check_arms(config: DictConfig, folder: Path, protocol: Protocol, costs: Mapping[str, int]) -> None:
    """Build and adapt every arm's model once, before hours of work lead to one that cannot be.

    Raises:
        ValueError: for an adapter that the task's body cannot take, with the task and the arm.
    """
    for task in protocol.tasks:
        for arm in protocol.arms:
            own = configured(config, folder, Point("arms", task, arm, protocol.arms_rank, 0, 0, 1.0, 1.0), costs[task])
            own.embedder.aligned = False  # its embedder is trained on the way
            try:
                adapted_model(own, outline(build(own.data)))
            except (ValueError, ImportError) as error:
                raise ValueError(f"evidence.tasks.{task}, arm {arm}: {error}") from error


def configured(
    config: DictConfig,
    folder: Path,
    point: Point,
    cost: int,
    keep_update: bool = False,
    donor: Point | None = None,
) -> DictConfig:
    """The config with which stage=finetune runs a point.

    Args:
        folder: of the evidence. cost: see `cost_of_one_rank`. keep_update: whether the learned ΔW is written. donor:
            the point whose update, or whose nested twin's held-out losses, the point's rule reads.
    """
    own = for_task(
        config,
        folder,
        point.task,
        {
            "seed": point.seed,
            "finetune": {
                "tag": point.name,
                "optimizer": {"lr": point.lr},
                "predictor_lr": point.predictor_lr,
                "embedder_lr": point.predictor_lr,
                "keep_update": keep_update,
            },
        },
    )
    if point.rule in config.evidence.arms:
        return _arm(config, own, point)
    if point.rule in (FROZEN, FULL):
        own.adapter = {"name": point.rule, "method": "probe" if point.rule == FROZEN else "full"}
        return own
    if point.rule == UNIFORM:
        own.rank = {"_target_": "orca_rank.ranks.uniform", "_partial_": True, "r": point.rank}
        return own
    node = plain(config.evidence.rules[point.rule])
    if point.rule in config.evidence.permuted:
        node["permutation"] = point.permutation
    if donor is not None and node["_target_"] == TRAINED:
        node["update"] = str(folder / point.task / "finetune" / donor.name / "update.safetensors")
    if donor is not None and node["_target_"] == POSTERIOR:
        node["losses"] = str(folder / point.task / "finetune" / nested_tag(donor) / "rank_losses.safetensors")
    own.rank = node
    least = int(config.evidence.r_min.get(point.rule, 0))
    own.budget = {"mean_rank": None, "total_rank": None, "parameters": cost * point.rank, "r_min": least, "r_max": None}
    return own


def nested_config(config: DictConfig, folder: Path, point: Point, cost: int) -> DictConfig:
    """The config of the nested adapter whose held-out losses a rule reads: of a uniform point's rank and rates.

    Raises:
        ValueError: if the options name no such adapter.
    """
    if config.evidence.nested is None:
        raise ValueError(
            "it reads the held-out losses of a nested adapter: choose one with +adapter@evidence.nested=matryoshka"
        )
    own = configured(config, folder, point, cost)
    own.adapter, own.finetune.tag = copy.deepcopy(config.evidence.nested), nested_tag(point)
    _keep_scaling(config, own)
    return own


def nested_tag(donor: Point) -> str:
    """The folder of the nested fine-tune at the rank and the rates of this one."""
    return f"nested-{donor.name}"


def _keep_scaling(config: DictConfig, own: DictConfig) -> None:
    """Adapters that have the option keep the run's scaling."""
    if "scaling" in (own.adapter.get("module") or {}):
        own.adapter.module.merge_with({name: config.adapter.module[name] for name in ("scaling", "alpha")})


def _arm(config: DictConfig, own: DictConfig, point: Point) -> DictConfig:
    """A task's config with an arm's groups taken over; uniform ranks unless it names others.

    An arm that aligns has run folders of its own, one a seed.
    """
    own.rank = {"_target_": "orca_rank.ranks.uniform", "_partial_": True, "r": point.rank}
    _take(own, config.evidence.arms[point.rule])
    _keep_scaling(config, own)
    if own.embedder.aligned:
        own.run = f"{point.task}-{point.rule}-s{point.seed}"
    return own

"""What several stages set up the same way: backbone, model, data, device."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from orca_rank.artifacts.command import command
from orca_rank.artifacts.files import read_tensors
from orca_rank.artifacts.lock import locked
from orca_rank.artifacts.provenance import contents_hash, differences, key, plain, select
from orca_rank.artifacts.unfinished import tidy
from orca_rank.backbone import OrcaModel, body_of, create_model, create_timm, source_model
from orca_rank.build import build
from orca_rank.data import Data
from orca_rank.data.module import InMemory
from orca_rank.fitted import Fitted
from orca_rank.measuring.matrices import adaptable_layers
from orca_rank.options import flag, one_of
from orca_rank.processes import first
from orca_rank.ranks import Layer
from orca_rank.stages.trainer import callbacks_of, check_logger, check_trainer, trainer_options
from orca_rank.task import Task
from orca_rank.weights import shipped

console = Console(highlight=False, markup=False)


# Data options that change neither which samples are the test set nor how they are read.
HARMLESS = ("batch_size", "seed", "workers", "device", "cache", "root")
# What a model's weights before fine-tuning depend on.
MODEL_SECTIONS = ("backbone", "embedder", "seed")


def resolve_backbone(config: DictConfig) -> dict[str, Any]:
    """The backbone config with `pretrained` as `backbone.create_timm` reads it: a bool or a path.

    `on_source` pretrains on the run's source data, once, and caches the weights; `shipped` takes the weights that
    come with this package.
    """
    backbone = plain(config.backbone)
    if backbone["pretrained"] == "on_source":
        backbone["pretrained"] = str(on_source(config))
    elif backbone["pretrained"] == "shipped":
        backbone["pretrained"] = str(shipped(backbone["shipped"]))
    return backbone


def build_model(config: DictConfig, task: Task) -> OrcaModel:
    """The model before fine-tuning, with the embedder that the config asks for.

    Raises:
        FileNotFoundError: embedder.aligned without a finished stage=align. ValueError: an embedder of another shape.
    """
    backbone = resolve_backbone(config)  # may pretrain one, and draw: before the seed, which is for what follows
    torch.manual_seed(config.seed)
    model = create_model(backbone, task, config.embedder.init, build(config.predictor.module))
    if config.embedder.aligned:
        path = aligned_embedder(config)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: run `{command('stage=align')}` first, or set "
                f"embedder.aligned=false to use the {config.embedder.init} initialisation"
            )
        state = read_tensors(path, "stage=align")
        try:
            model.embedder.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit this backbone and target ({str(error).splitlines()[-1].strip()}): run "
                f"`{command('stage=align', 'force=true')}`"
            ) from error
    return model


def contents(config: DictConfig, *places: str) -> dict[str, str]:
    """place in the config -> a hash of the files that its data are read from, or that its options name, for those that
    read any: with the options, what a result depends on.

    Args:
        places: of data configs; "backbone" and "rank" for files that their options name.
    """
    found = {}
    for place in places:
        node = OmegaConf.select(config, place)
        if place in ("backbone", "rank"):
            named = [Path(value) for value in plain(node).values() if isinstance(value, str) and os.path.isfile(value)]
            value = contents_hash(named) if named else None
        else:
            value = getattr(build(node), "contents", None)
        if value is not None:
            found[place] = value
    return found


def source_side(backbone: Mapping[str, Any], seed: int, data: Any) -> OrcaModel:
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


def seed_everything(seed: int) -> None:
    """Every generator that draws in this process."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (a user's own data or metric may draw from it)
    torch.manual_seed(seed)


def held(folder: Path) -> contextlib.AbstractContextManager[None]:
    """`locked` by the first of the processes that work in a folder together."""
    return locked(folder) if first() else contextlib.nullcontext()


def outline(data: Data) -> Task:
    """The task of a data module, without loading the data where the module can tell its shapes beforehand."""
    return getattr(data, "outline", None) or data.task


def ready(node: DictConfig | Mapping[str, Any], part: str = "fit", **options: Any) -> Data:
    """A data module built from its config and set up for "fit" or "test": its loaders can be asked for.

    Args:
        node: a data config with a `_target_`. options: instead of, or beside, those in the config.
    """
    data: Data = build(node, **options)
    data.prepare_data()
    data.setup(part)
    return data


def data_for(node: DictConfig | Mapping[str, Any], fitted: Fitted, part: str) -> Any:
    """The data module of a config node for a fine-tuned model: inputs are normalised, and classes numbered, as they
    were in its fine-tune.

    Args:
        part: "fit" or "test", which is then set up; "all" for data that may have no targets, see
            `InMemory.everything`.

    Raises:
        ValueError: if the data are of another task, or are not known how to normalise.
    """
    data, task = build(node), fitted.task
    if isinstance(data, InMemory):
        data.given, data.given_kind = fitted.inputs, task.kind
        if task.kind in ("classification", "segmentation"):
            data.given_classes = task.classes or tuple(range(task.output_shape[0]))
    elif part == "all":
        raise ValueError(
            f"{type(data).__name__} cannot give new data whole: name files by data=arrays or data=image_folder, or use "
            f"the data options of the fine-tune, whose test set is predicted"
        )
    if part == "all" and fitted.inputs is None and getattr(data, "normalise", None) != "none":
        if fitted.metrics["config"]["data"].get("normalise") == "none":
            raise ValueError("the model was fine-tuned on inputs as they are: set data.normalise=none for new ones too")
        raise ValueError(
            f"the fine-tune kept no statistics to normalise new inputs by (an earlier version did not, or its data "
            f"module has none): run `{command('stage=finetune', 'force=true')}` on the data that it was trained on"
        )
    data.prepare_data()
    if part == "all":
        return data
    data.setup(part)
    if (data.task.kind, data.task.output_shape) != (task.kind, task.output_shape):
        raise ValueError(
            f"the model was fine-tuned for {task.kind} {task.output_shape}, the data are "
            f"{data.task.kind} {data.task.output_shape}: choose the data that it was trained on"
        )
    return data


def changes(tuned: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what the data differ from those of the fine-tune, `HARMLESS` options aside; empty for the same test set."""

    def of(values: Mapping[str, Any]) -> dict[str, Any]:
        options = {name: value for name, value in values["data"].items() if name not in HARMLESS}
        return {"data": options, "contents": (values.get("contents") or {}).get("data")}

    return sorted(differences(of(tuned), of(now)))


def check_same_data(config: DictConfig, fitted: Fitted) -> None:
    """Refuse other data than a model was fine-tuned on where its own validation and test samples are asked for: those
    of others may be among its training samples.

    Raises:
        ValueError: naming the options that differ.
    """
    now = {"data": plain(config.data), "contents": contents(config, "data")}
    if differing := changes(fitted.metrics["config"], now):
        raise ValueError(
            f"the model was fine-tuned on other data ({'; '.join(differing[:6])}), some of which may be in these "
            f"validation and test sets: give the data options of the fine-tune"
        )


def aligned_embedder(config: DictConfig) -> Path:
    """Where stage=align leaves the embedder."""
    return stage_folder(config, "align") / "embedder.safetensors"


def bare_model(config: DictConfig, task: Task) -> OrcaModel:
    """The architecture alone, on the meta device: no weights are read, drawn or stored."""
    with torch.device("meta"):
        return create_model(
            {**plain(config.backbone), "pretrained": False}, task, config.embedder.init, build(config.predictor.module)
        )


def bare_layers(config: DictConfig) -> tuple[nn.Module, list[Layer]]:
    """The body without weights, and its layers that layers.target and layers.qkv choose; needs no data.

    Raises:
        ValueError: for a backbone that there is not, or a choice that fits no layer.
    """
    with torch.device("meta"):
        body = create_timm({**plain(config.backbone), "pretrained": False})
    body = body_of(body)
    return body, adaptable_layers(body, config.layers.target, config.layers.qkv)


def stage_folder(config: DictConfig, stage: str) -> Path:
    """runs/<run>/<stage>; not created until something is written."""
    return Path(config.paths.runs) / str(config.run) / stage


def check(config: DictConfig) -> None:
    """Options that the stages which train share, before anything is written.

    Raises:
        ValueError: for a value that means nothing.
    """
    check_model(config)
    check_trainer(config.trainer)
    check_logger(config.logger)
    callbacks_of(config)


def check_model(config: DictConfig) -> None:
    """Those of the model, also for stages that train nothing; errors as in `check`."""
    if not isinstance(config.layers.target, str):
        raise ValueError(f"layers.target={config.layers.target}: expected a regular expression")
    one_of("embedder.init", config.embedder.init, ("pretrained", "random"))
    flag("embedder.aligned", config.embedder.aligned)
    flag("embedder.train", config.embedder.train)
    flag("predictor.frozen_on_purpose", config.predictor.frozen_on_purpose)


def on_source(config: DictConfig) -> Path:
    """The weights for backbone.pretrained=on_source: trained once for a source and recipe, and kept in paths.cache."""
    made_from = {**select(config, "source", "backbone"), "contents": contents(config, "source")}
    folder = Path(config.paths.cache) / "pretrain" / key(made_from)
    weights, trainer = folder / "weights.safetensors", trainer_options(config.trainer)
    if not (folder / "metrics.json").exists() or not weights.exists():
        with locked(folder, wait=True):  # jobs of a sweep that need the same weights wait for the first
            if not (folder / "metrics.json").exists() or not weights.exists():
                console.print(
                    f"pretraining {config.backbone.name} on the source data, kept in {folder}", soft_wrap=True
                )
                from orca_rank.training.pretrain import pretrain_source  # here, because lightning takes seconds

                pretrain_source(made_from["backbone"], build(config.source), folder, made_from, trainer)
    tidy(folder)
    return weights

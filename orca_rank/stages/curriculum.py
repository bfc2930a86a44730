"""finetune.curriculum: the labelled source images that a fine-tune's batches are mixed with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from orca_rank.backbone import OrcaModel
from orca_rank.backbone.families import feature_info
from orca_rank.build import build
from orca_rank.data import Data
from orca_rank.stages.passing import labelled
from orca_rank.stages.setup import outline, ready, resolve_backbone, source_side
from orca_rank.task import Task
from orca_rank.training.features import plain_loader
from orca_rank.training.finetune import FinetuneOptions
from orca_rank.training.pare import Lender, PaRe, trained_parts


class LabelledSource(NamedTuple):
    """Images with a class each, and the pretrained embedder that they pass through."""

    data: Data
    classes: int
    embedder: nn.Module


def check_source(config: DictConfig) -> None:
    """What can be said of finetune.curriculum and its source before anything is loaded.

    Raises:
        ValueError: for a name in place of the curriculum's options, or a source without labels.
    """
    node = config.finetune.curriculum
    if node is None:
        return
    if not OmegaConf.is_dict(node):
        raise ValueError(f"finetune.curriculum={node}: choose it as the option of a group, finetune/curriculum=pare")
    if not labelled(build(config.source)):
        raise ValueError(f"finetune.curriculum takes images with a class each: {_instead('the source has no labels')}")


def labelled_source(config: DictConfig) -> LabelledSource | None:
    """The source, loaded, with its embedder, where there is a curriculum.

    Raises:
        ValueError: if its images have no class each, or other channels than the pretrained embedder reads.
    """
    if config.finetune.curriculum is None:
        return None
    data = ready(config.source)
    embedder = source_side(resolve_backbone(config), int(config.seed), data).embedder
    return LabelledSource(data, _classes(data.task, embedder), embedder)


def beside(config: DictConfig, model: OrcaModel) -> nn.ModuleDict:
    """What the curriculum trains beside the model, without weights: to count it."""
    with torch.device("meta"):
        return _parts(model, _classes(outline(build(config.source)), None))


def make_curriculum(
    source: LabelledSource | None, options: FinetuneOptions, model: OrcaModel, task: Task, seed: int
) -> PaRe | None:
    """PaRe for a fine-tune of this model, if it is to have any. The weights of its gate and head depend on the seed
    alone, and drawing them leaves what is drawn after them as it would be."""
    if source is None or options.curriculum is None:
        return None
    loader = plain_loader(source.data, "train", 1)
    lender = Lender(loader.dataset, loader.collate_fn, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _parts(model, source.classes)
    return PaRe(options.curriculum, task, lender, source.embedder, parts, options.epochs, seed)


def _parts(model: OrcaModel, classes: int) -> nn.ModuleDict:
    width: Any = model.embedder.width
    return trained_parts(int(width), int(feature_info(model.body)[-1]["num_chs"]), classes)


def _classes(task: Task, embedder: nn.Module | None) -> int:
    """How many classes the source's images have."""
    if task.kind != "classification":
        raise ValueError(
            f"finetune.curriculum takes images with a class each: {_instead(f'the source is a {task.kind} task')}"
        )
    channels = getattr(embedder, "channels", task.input_shape[0])
    if task.input_shape[0] != channels:
        received = f"the source's images have {task.input_shape[0]} channels, the pretrained embedder reads {channels}"
        raise ValueError(f"finetune.curriculum: {_instead(received)}")
    return task.output_shape[0]


def _instead(received: str) -> str:
    return (
        f"{received}; set source to tiny_imagenet, cifar10_5k, image_folder, arrays with classes, digits, or embedded "
        f"(the tokens of the 256 images that come with swin_micro)"
    )

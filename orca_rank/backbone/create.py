"""A timm vision transformer as embedder | body | predictor (ORCA, arXiv 2302.05738, section 3)."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from orca_rank.backbone.families import (
    body_of,
    channels_of,
    embedder_of,
    family_of,
    has_own_size,
    image_size,
    stages_of,
)
from orca_rank.backbone.hub import from_hub
from orca_rank.backbone.model import OrcaModel
from orca_rank.backbone.the_timm import timm
from orca_rank.predictors import Stages
from orca_rank.predictors.orca import orca
from orca_rank.predictors.series import Unfolded
from orca_rank.task import Task
from orca_rank.weights.file import load_weights


def create_timm(backbone: Mapping[str, Any]) -> nn.Module:
    """The timm model that a backbone config names, with its weights, without pooling or classes.

    Args:
        backbone: name: a timm model of one of `orca_rank.backbone.families`; pretrained: true (timm's hub), false
            (random) or a path to a file of weights (safetensors, or a torch state dict); options: passed on to
            timm.create_model; img_size, the pixels that inputs are resized to, is there for families without it too.

    Raises:
        ValueError: unknown name or options, a family that is not known to come apart, or a file that does not fit.
            FileNotFoundError: no such file. ConnectionError: the hub cannot be reached.
    """
    name, options, source = backbone["name"], dict(backbone.get("options") or {}), backbone["pretrained"]
    if not isinstance(source, bool | str):
        raise ValueError(f"backbone.pretrained={source}: expected true, false or the path of a file of weights")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}; close: {', '.join(close) or 'none'}: set backbone.name")
    options.update(num_classes=0, global_pool="")
    pixels = options.get("img_size")
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except Exception as error:
        if not (isinstance(error, TypeError) and "img_size" in options and "img_size" in str(error)):
            raise _refused(name, options, error) from error
        del options["img_size"]
        try:
            model = timm.create_model(name, pretrained=False, **options)
        except Exception as again:
            raise _refused(name, options, again) from again
    family = family_of(model, name)
    if source is True:
        model = from_hub(name, options)
    if pixels is not None:
        model.input_pixels = pixels
    _check_size(model, name)
    if isinstance(source, str):
        load_weights(model, Path(source))
    family.prepare(model)
    return model


def _refused(name: str, options: Mapping[str, Any], error: Exception) -> ValueError:
    given = {key: value for key, value in options.items() if key not in ("num_classes", "global_pool")}
    reason = str(error).partition("\n")[0] or type(error).__name__
    if "token" in reason or "pool" in reason:
        return ValueError(
            f"{name} gives no tokens at places, which predictors read ({reason}): choose another backbone.name"
        )
    return ValueError(f"timm's {name} does not take these backbone.options: {given} ({reason})")


def _check_size(model: nn.Module, name: str) -> None:
    """Refuse an image that the stages of a model without a size of its own do not divide."""
    if has_own_size(model):
        return
    size, deepest = image_size(model, name), max(stages_of(model).reductions)
    if any(side % deepest for side in size):
        raise ValueError(
            f"{name} reads images whose sides are multiples of {deepest}: backbone.options.img_size={list(size)}"
        )


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names and values of a module's parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def create_model(
    backbone: Mapping[str, Any],
    task: Task,
    embedder_init: str = "pretrained",
    predictor: Callable[[Stages, tuple[int, ...]], nn.Module] = orca,
) -> OrcaModel:
    """Embedder for the task's inputs, pretrained body, freshly initialised predictor.

    Args:
        backbone: the backbone config (see `create_timm`). task: the target. embedder_init: see `Embedder`.
        predictor: makes the predictor, see `orca_rank.predictors`.
    """
    body = create_timm(backbone)
    embedder = embedder_of(body, task.input_shape, embedder_init, backbone["name"])
    stages = stages_of(body)
    if task.series and len(task.output_shape) == 3:
        head: nn.Module = Unfolded(predictor, stages, embedder.grid, task.output_shape)
    else:
        head = predictor(stages, task.output_shape)
    return OrcaModel(embedder, body_of(body), head)


def source_model(backbone: Mapping[str, Any]) -> OrcaModel:
    """The pretrained first part and body, frozen and in eval mode: what source data pass through."""
    body = create_timm(backbone)
    shape = (channels_of(body), *image_size(body))
    embedder = embedder_of(body, shape, "pretrained", backbone["name"])
    return OrcaModel(embedder, body_of(body), nn.Identity()).requires_grad_(False).eval()

"""The LightningModule of stage=pretrain, and the loop around it."""

from __future__ import annotations

import copy
import csv
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from orca_rank.artifacts.files import write_json, write_tensors
from orca_rank.artifacts.unfinished import finish
from orca_rank.data.augment import mix, soft_labels
from orca_rank.data.module import Batches, EpochOrder, as_it_is
from orca_rank.normaliser import Normaliser
from orca_rank.options import one_of, read
from orca_rank.training.average import decay_at
from orca_rank.training.curve import Curve
from orca_rank.training.keep import Keep, checkpoint_of, fit
from orca_rank.training.muon import MuonAdamW, parameter_groups
from orca_rank.training.recipe import ON_THE_SPOT, Recipe, keep_recipe

console = Console(highlight=False, markup=False)
Pair = tuple[Tensor, Tensor]
COLUMNS = ("epoch", "lr", "seconds", "train/loss", "val/top1", "val/top1_raw")


class Pretrain(L.LightningModule):
    """Soft-label cross-entropy on augmented batches, with a moving average of the weights.

    Args:
        network: images (B, C, H, W), normalised → logits (B, classes); images of another size than its patch_embed
            takes are resized first. recipe: see `Recipe`. classes: number of them.
        mean, std: of the channels of images in [0, 1], each (C, 1, 1).
    """

    mean: Tensor
    std: Tensor
    updates: Tensor

    def __init__(self, network: nn.Module, recipe: Recipe, classes: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network, self.recipe, self.classes = network, recipe, classes
        self.average = copy.deepcopy(network).requires_grad_(False)
        patches = getattr(network, "patch_embed", None)
        self.size: tuple[int, int] | None = None if patches is None else tuple(patches.img_size)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.loss = torch.compile(self._loss, dynamic=False) if recipe.compile else self._loss

    def _loss(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.network(x).float(), target)

    def normalised(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (x - self.mean) / self.std

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        images, labels = batch
        options = self.recipe.augmentation_in(self.current_epoch)
        random = np.random.default_rng((self.recipe.seed, self.current_epoch, index))
        torch.manual_seed(int(random.integers(2**31)))  # dropout and drop path, the same after a resume
        x = options.images(unit_range(images, self.size), random)
        target = soft_labels(labels, self.classes, options.smoothing)
        x, target = mix(x, target, options, random)
        loss = self.loss(self.normalised(x), target)
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        count = int(self.updates)
        update_average(self.average, self.network, decay_at(count, self.recipe.ema))
        self.updates += 1

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        """Top-1 of the average on every batch, of the raw weights on every fourth (a cheap second curve)."""
        images, labels = batch
        x = self.normalised(unit_range(images, self.size))
        for name, network in (("val/top1", self.average), ("val/top1_raw", self.network)):
            if network is self.average or index % 4 == 0:
                right = (network(x).argmax(1) == labels).float().mean()
                self.log(name, right, on_step=False, on_epoch=True, batch_size=len(x))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        recipe, muon = self.recipe, self.recipe.optimizer == "muon"
        groups = parameter_groups(self.network, recipe.weight_decay, muon)
        make = MuonAdamW if muon else torch.optim.AdamW
        optimizer = make(groups, lr=recipe.lr, betas=(0.9, 0.99))
        epochs = self.trainer.max_epochs or recipe.epochs
        course = recipe.course(self.trainer.estimated_stepping_batches / epochs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: course.factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Best(Callback):
    """After every epoch weights.safetensors, if the average is the best so far, and one line with the time left.

    Args:
        folder: for the weights. recipe: see `Recipe`. curve: what has been seen so far.
    """

    def __init__(self, folder: Path, recipe: Recipe, curve: Curve) -> None:
        self.folder, self.recipe, self.curve = folder, recipe, curve

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        *before, row = self.curve.rows
        done, top1, seconds = len(self.curve.rows), row["val/top1"], row["seconds"]
        if isinstance(module, Pretrain) and top1 > max((old["val/top1"] for old in before), default=-1.0):
            dtype = torch.float16 if self.recipe.half else torch.float32
            write_weights(self.folder / "weights.safetensors", module, dtype, done, top1)
        console.print(
            f"epoch {done}/{self.recipe.epochs}  loss {row['train/loss']:.3f}  top-1 {top1:.2%} (raw weights "
            f"{row['val/top1_raw']:.2%})  {seconds:.0f} s, {(self.recipe.epochs - done) * seconds / 60:.0f} min left"
        )


def pretrain(
    network: nn.Module,
    train: Pair,
    val: Pair,
    folder: Path,
    recipe: Recipe,
    classes: int | None = None,
    trainer: dict[str, Any] | None = None,
) -> Path:
    """Train, or go on from folder/last.ckpt, and return folder/weights.safetensors: the best average.

    Args:
        network: a classifier, for example timm.create_model(..., num_classes=classes).
        train, val: (images, labels); images (n, C, H, W) uint8 or float in [0, 1], labels (n,) integers from 0.
        folder: for last.ckpt, curve.csv and weights.safetensors. recipe: see `Recipe`.
        classes: number of outputs; by default the largest label + 1.
        trainer: further options of lightning.Trainer, such as accelerator or precision ("bf16-mixed").

    Raises:
        ValueError: for no images, or for a checkpoint made with another recipe (epochs and compile may change).
    """
    if not len(train[0]) or not len(val[0]):
        raise ValueError(
            f"pretraining needs images, received {len(train[0])} to train on and {len(val[0])} to validate on"
        )
    classes = int(train[1].max()) + 1 if classes is None else classes
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(folder)
    keep_recipe(folder / "recipe.json", recipe, checkpoint is not None)
    channels = Normaliser.fit(train[0], "channel")
    mean, std = channels.mean.float(), torch.where(channels.std > 0, channels.std, 1.0).float()
    scale = 255 if train[0].dtype == torch.uint8 else 1
    module = Pretrain(network, recipe, classes, mean / scale, std / scale)
    count = len(train[0])
    order = EpochOrder(count, recipe.seed)
    curve = Curve(folder / "curve.csv", COLUMNS, first=1)
    options: dict[str, Any] = {
        "accelerator": "auto",
        "devices": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "num_sanity_val_steps": 0,
        "callbacks": [curve, Best(folder, recipe, curve), Keep(folder)],
        "max_epochs": recipe.epochs,
        "accumulate_grad_batches": recipe.accumulate,
        "gradient_clip_val": recipe.clip,
        **(trainer or {}),
    }
    loaders = [
        DataLoader(
            Batches(train[0], train[1].long()),
            min(recipe.batch_size, count),
            sampler=order,
            collate_fn=as_it_is,
            drop_last=True,
        ),
        DataLoader(TensorDataset(val[0], val[1].long()), batch_size=min(500, len(val[0]))),
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # batches are cut from memory
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
        fit(L.Trainer(**options), module, checkpoint, train_dataloaders=loaders[0], val_dataloaders=loaders[1])
    return folder / "weights.safetensors"


def unit_range(images: Tensor, size: tuple[int, int] | None) -> Float[Tensor, "b c h w"]:
    """uint8 images to [0, 1], float images as they are; resized to the network's size where that is another."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return x if size is None or x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """θ̄ ← decay θ̄ + (1 − decay) θ for parameters; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for old, new in zip(average.buffers(), network.buffers(), strict=True):
        old.copy_(new)


def write_weights(path: Path, module: Pretrain, dtype: torch.dtype, epoch: int, top1: float) -> None:
    """The averaged weights as safetensors, with what a reader needs to use them as metadata."""
    state = {name: value.to(dtype) for name, value in module.average.state_dict().items() if value.is_floating_point()}
    mean, std = (
        json.dumps([round(value, 6) for value in part.flatten().tolist()]) for part in (module.mean, module.std)
    )
    write_tensors(path, state, {"epoch": str(epoch), "val_top1": f"{top1:.6f}", "mean": mean, "std": std})


def recipe_of(backbone: Mapping[str, Any]) -> tuple[Recipe, str]:
    """How a backbone config wants to be pretrained, and the part of the source to validate on.

    Raises:
        ValueError: for a value that means nothing.
    """
    options = {name: value for name, value in backbone.get("recipe", ON_THE_SPOT).items() if value is not None}
    validate_on = options.pop("validate_on", "val")
    one_of("backbone.recipe.validate_on", validate_on, ("val", "test"))
    return read(Recipe, options, "backbone.recipe"), validate_on


def pretrain_source(
    backbone: Mapping[str, Any],
    source: Any,
    folder: Path,
    made_from: Mapping[str, Any],
    trainer: dict[str, Any],
) -> None:
    """Pretrain a backbone on a source of images and write weights.safetensors and metrics.json to the folder.

    Args:
        backbone: the backbone config as plain values; its `recipe`, if it has one. source: a data module with `parts`.
        folder: where. made_from: what the result depends on. trainer: options of lightning.Trainer.

    Raises:
        ValueError: a source that is not a classification of images, or an unknown validate_on.
    """
    recipe, validate_on = recipe_of(backbone)
    if getattr(source, "embedded", False):
        raise ValueError(
            "the source comes as tokens of another backbone, without images to pretrain on: choose source=digits, "
            "tiny_imagenet, cifar10_5k, image_folder or arrays"
        )
    parts = source.parts
    if parts.task.kind != "classification":
        raise ValueError(f"pretraining needs a source with classes, this one is a {parts.task.kind} task")
    train, val = parts.train, parts.val
    if validate_on == "test":
        train, val = (torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])), parts.test
    if train[0].dtype != torch.uint8 and (train[0].min() < 0 or train[0].max() > 1):
        raise ValueError("pretraining takes source images as uint8 or as floats in [0, 1]")
    classes, start = parts.task.output_shape[0], time.monotonic()
    torch.manual_seed(recipe.seed)
    network = timm.create_model(
        backbone["name"], num_classes=classes, in_chans=parts.task.input_shape[0], **backbone["options"]
    )
    weights = pretrain(network, train, val, folder, recipe, classes, trainer)
    with (folder / "curve.csv").open() as stream:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    best = max(rows, key=lambda row: row["val/top1"])
    metrics = {f"{validate_on}/top1": best["val/top1"], "epoch": best["epoch"], "epochs": len(rows)}
    metrics |= {"seconds": sum(row["seconds"] for row in rows), "seconds_this_time": time.monotonic() - start}
    write_json(folder / "metrics.json", {"weights": weights.name, **metrics}, config=made_from)
    finish(folder)

"""The Trainer and the optimiser as options give them: checked before any work, and built for a stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import ListConfig
from torch import nn

from orca_rank.artifacts.provenance import plain
from orca_rank.build import build
from orca_rank.options import number

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.callbacks import Callback

# What a stage tells the Trainer itself, and the option that says it.
OWN = {
    "max_epochs": "finetune.epochs or align.epochs",
    "accumulate_grad_batches": "finetune.accumulate",
    "gradient_clip_val": "finetune.clip",
    "logger": "logger=csv or logger=wandb",
    "default_root_dir": "paths.runs",
    "reload_dataloaders_every_n_epochs": "nothing: the stage needs it",
}


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raise a ValueError for options that Lightning refuses, that a stage sets itself, or more than one process."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException  # here, because it takes seconds

    for name, instead in OWN.items():
        if name in trainer:
            raise ValueError(f"trainer.{name} is set by the stage: use {instead}")
    devices = trainer.get("devices", 1)
    many = len(devices) if isinstance(devices, list | ListConfig) else devices
    if str(many) not in ("1", "auto") or trainer.get("num_nodes", 1) != 1 or (many == "auto" and gpus(trainer) > 1):
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={trainer.get('num_nodes', 1)}: this version trains in one "
            f"process, because the metrics of several would each cover a part of the data; set trainer.devices=1 "
            f"trainer.num_nodes=1"
        )
    try:
        build(trainer, logger=False, enable_checkpointing=False)
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error


def gpus(trainer: Mapping[str, Any]) -> int:
    """How many GPUs devices=auto would take."""
    return 0 if trainer.get("accelerator", "auto") == "cpu" else torch.cuda.device_count()


def check_optimizer(node: Any, name: str) -> None:
    """Raise a ValueError for an optimiser, named so in messages, that cannot be made with its options."""
    options = plain(node)
    number(f"{name}.lr", options.get("lr"), above=0)
    try:
        build(node)([nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def trainer_for(trainer: Any, logger: Any, folder: Path, callbacks: list[Callback], **options: Any) -> L.Trainer:
    """Lightning's Trainer for a stage: one process, its logger in the stage's folder, no checkpoints of its own."""
    from lightning.pytorch.plugins.environments import LightningEnvironment

    from orca_rank.training.packed import PackedIO

    options |= {"plugins": [LightningEnvironment(), PackedIO()]} if "plugins" not in trainer else {}
    return build(
        trainer,
        default_root_dir=str(folder),
        callbacks=callbacks,
        logger=build(logger, save_dir=str(folder / "log")) if logger else False,
        **options,
    )


def device_of(trainer: Mapping[str, Any]) -> torch.device:
    """Where a stage computes without a Trainer: the GPU, if there is one and trainer.accelerator allows it."""
    wanted = trainer.get("accelerator", "auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def trainer_options(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Where and how precisely pretraining computes: what a run's trainer says of it."""
    return {name: trainer[name] for name in ("accelerator", "precision") if name in trainer}


def close_logger(trainer: L.Trainer) -> None:
    """End a tracked run: W&B would give an open one to the next job of a sweep, which shares the process."""
    finish = getattr(getattr(trainer.logger, "experiment", None), "finish", None)
    if finish is not None:
        finish()

"""The options of pretraining."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from orca_rank.artifacts.files import atomic
from orca_rank.data.augment import Augmentation
from orca_rank.options import number, one_of, whole
from orca_rank.training.schedule import Schedule

# For a backbone config without a recipe of its own: a small Swin on one or two thousand small images, such as digits.
ON_THE_SPOT = {
    "epochs": 4,
    "batch_size": 16,
    "optimizer": "muon",
    "lr": 5e-3,
    "warmup_epochs": 0.5,
    "ema": 0.95,
    "augmentation": {"crop_scale": [0.8, 1.0], "crop_ratio": 1.1, "flip": False, "smoothing": 0.05},
}


@dataclass(frozen=True)
class Recipe:
    """How to pretrain.

    Args:
        epochs: passes over the training images.
        batch_size: images per pass through the network; accumulate: passes per optimiser step.
        optimizer: "adamw", or "muon" for Muon on the matrices of the body and AdamW on the rest.
        lr, weight_decay: peak learning rate, decoupled weight decay (not on biases, norms and position tables).
        warmup_epochs: of linear warm-up.
        schedule: "cosine" to 0, or "wsd" (warm-up, stable, decay: constant until `decay_epochs` before the end, then
            linear to 0; arXiv 2404.06395). With wsd the end may be moved by a resume before the decay has begun.
        ema: decay β of the moving average of the weights, θ̄ ← β_t θ̄ + (1 − β_t) θ with β_t = min(β, (1 + t)/(10 + t)).
        clip: largest gradient norm, or null.
        compile: torch.compile the training step (a few minutes once, then about a quarter faster on a CPU).
        half: write the weights as float16.
        seed: of initial order, augmentation and dropout.
        augmentation: see `Augmentation`. decay_augmentation: with wsd, another one while the learning rate decays, when
            a small network begins to know its training images by heart.
    """

    epochs: int = 30
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    schedule: str = "cosine"
    decay_epochs: float = 8.0
    ema: float = 0.998
    clip: float | None = None
    compile: bool = False
    half: bool = True
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    decay_augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            whole(f"recipe.{name}", getattr(self, name))
        one_of("recipe.optimizer", self.optimizer, ("adamw", "muon"))
        one_of("recipe.schedule", self.schedule, ("cosine", "wsd"))
        number("recipe.lr", self.lr, above=0)
        number("recipe.weight_decay", self.weight_decay, least=0)
        number("recipe.warmup_epochs", self.warmup_epochs, least=0)
        number("recipe.decay_epochs", self.decay_epochs, least=0)
        number("recipe.ema", self.ema, least=0, below=1)
        number("recipe.clip", self.clip, above=0, null=True)
        whole("recipe.seed", self.seed, 0)
        if self.decay_augmentation is not None and self.schedule != "wsd":
            raise ValueError("recipe.decay_augmentation needs schedule=wsd, whose decay begins at a known epoch")

    def augmentation_in(self, epoch: int) -> Augmentation:
        """That of epoch 0, 1, …"""
        if self.decay_augmentation is not None and epoch >= self.epochs - self.decay_epochs:
            return self.decay_augmentation
        return self.augmentation

    def course(self, steps_per_epoch: float) -> Schedule:
        """The learning rates of every optimiser step."""
        lengths = (self.epochs, self.warmup_epochs, self.decay_epochs)
        return Schedule(self.schedule, *(epochs * steps_per_epoch for epochs in lengths))


def keep_recipe(path: Path, recipe: Recipe, resuming: bool) -> None:
    """Write the recipe beside the checkpoint, after a check that the checkpoint was made with the same one.

    Raises:
        ValueError: if other options than epochs, decay_epochs and compile have changed.
    """
    values = json.loads(json.dumps(asdict(recipe)))
    if resuming and path.exists():
        stored = json.loads(path.read_text())
        changed = [k for k in values if stored.get(k) != values[k] and k not in ("epochs", "decay_epochs", "compile")]
        if changed:
            raise ValueError(
                f"{path.parent} holds a run with other options ({', '.join(changed)}): "
                f"use another folder, or remove last.ckpt there"
            )
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")

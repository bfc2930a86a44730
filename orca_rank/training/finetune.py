"""The LightningModule of stage=finetune, and the learning curve it leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from orca_rank import adapters
from orca_rank.artifacts.files import write_csv
from orca_rank.backbone import OrcaModel
from orca_rank.task import Task


class FineTune(L.LightningModule):
    """One training step of the adapted model.

    Args:
        model: with exactly the parameters to train set to require gradients. task: loss and metric.
        optimizer: takes parameter groups. settings: warmup_epochs, schedule, epochs; lr_ratio: LoRA+'s λ, the
            learning rate of B over that of A (1: the same). seed: of what adapters draw in each step.
    """

    def __init__(self, model: OrcaModel, task: Task, optimizer: Any, settings: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.model, self.task, self.make_optimizer, self.settings = model, task, optimizer, settings
        self.seed = seed
        self.strict_loading = False  # checkpoints leave out what is frozen
        self.draws = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Dropout and adapters draw the same after a resume, whatever was drawn before it.
        torch.manual_seed(self.seed * 1_000_003 + self.current_epoch * 100_003 + batch_index)
        if batch_index % self.trainer.accumulate_grad_batches == 0:  # one draw per optimiser step, as DyLoRA
            self.draws.manual_seed(self.seed * 1_000_003 + self.global_step)
            adapters.begin_step(self.model.body, self.draws)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, y = batch
        loss = self.task.loss(self(x), y)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss.item()} in epoch {self.current_epoch}, batch {batch_index}: lower "
                f"finetune.optimizer.lr or set finetune.clip=1.0"
            )
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(x), prog_bar=True)
        return loss + adapters.extra_loss(self.model.body)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        adapters.end_step(self.model.body)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        x, y = batch
        prediction = self(x)
        name = f"{split}/{self.task.metric_name}"
        self.log(name, self.task.metric(prediction, y).mean(), batch_size=len(x), prog_bar=True)
        if self.task.kind == "classification":
            self.log(f"{split}/cross_entropy", self.task.loss(prediction, y), batch_size=len(x))

    def configure_optimizers(self) -> dict[str, Any]:
        lr = self.make_optimizer.keywords["lr"]
        groups = adapters.parameter_groups(self.model.body, lr=lr, ratio=self.settings["lr_ratio"])
        rest = [p for part in (self.model.embedder, self.model.predictor) for p in part.parameters() if p.requires_grad]
        optimizer = self.make_optimizer([*groups, {"params": rest}])
        schedule, epochs, warmup = (self.settings[name] for name in ("schedule", "epochs", "warmup_epochs"))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: lr_factor(epoch, schedule, epochs, warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = trained_tensors(self.model)
        checkpoint["state_dict"] = {f"model.{name}": value for name, value in kept.items()}


def lr_factor(epoch: int, schedule: str, epochs: int, warmup: int) -> float:
    """Learning rate of an epoch over its peak: a linear warm-up, then linear or cosine decay to 0, or constant."""
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    progress = min(1.0, (epoch - warmup) / max(1, epochs - warmup))
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def trained_tensors(model: OrcaModel) -> dict[str, Tensor]:
    """Everything of a model that training changes: trainable parameters and what adapters say they change besides."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainable |= {f"body.{name}" for name in adapters.adapter_state_dict(model.body)}
    return {name: value for name, value in model.state_dict().items() if name in trainable}


class Curve(Callback):
    """curve.csv: one row an epoch, rewritten whole so that a resumed run goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.lr = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.lr = trainer.optimizers[0].param_groups[-1]["lr"]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        row = {"epoch": trainer.current_epoch, "lr": self.lr, **values}
        self.rows = [old for old in self.rows if old["epoch"] < row["epoch"]] + [row]

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.rows and "train/loss" in trainer.callback_metrics:
            self.rows[-1]["train/loss"] = float(trainer.callback_metrics["train/loss"])
        write_csv(self.path, self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

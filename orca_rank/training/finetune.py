"""The LightningModule of stage=finetune, and its options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from orca_rank import adapters
from orca_rank.backbone import OrcaModel
from orca_rank.options import flag, number, one_of, whole
from orca_rank.task import Task
from orca_rank.training.curve import RunningMean
from orca_rank.training.schedule import SCHEDULES, Schedule


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune; `conf/config.yaml` says what each option is.

    Raises:
        ValueError: for a value that means nothing, naming the option.
    """

    epochs: int
    accumulate: int = 1
    clip: float | None = None
    schedule: str = "linear"
    warmup: float = 0.05
    warmup_epochs: float | None = None
    decay: float = 0.2
    patience: int | None = None
    predictor_lr: float | None = None
    embedder_lr: float | None = None
    keep_update: bool = False

    def __post_init__(self) -> None:
        whole("finetune.epochs", self.epochs)
        whole("finetune.accumulate", self.accumulate)
        number("finetune.clip", self.clip, above=0, null=True)
        one_of("finetune.schedule", self.schedule, SCHEDULES)
        number("finetune.warmup", self.warmup, least=0, most=1)
        number("finetune.warmup_epochs", self.warmup_epochs, least=0, most=self.epochs, null=True)
        number("finetune.decay", self.decay, least=0, most=1)
        whole("finetune.patience", self.patience, null=True)
        number("finetune.predictor_lr", self.predictor_lr, above=0, null=True)
        number("finetune.embedder_lr", self.embedder_lr, above=0, null=True)
        flag("finetune.keep_update", self.keep_update)

    def course(self, steps: float) -> Schedule:
        """The learning rates of a run of so many optimiser steps."""
        warmup = self.warmup if self.warmup_epochs is None else self.warmup_epochs / self.epochs
        return Schedule(self.schedule, steps, warmup * steps, self.decay * steps)


class FineTune(L.LightningModule):
    """One training step of the adapted model.

    Args:
        model: with exactly the parameters to train set to require gradients. task: loss and metric.
        optimizer: takes parameter groups; its lr is the adapter's, or the body's. options: see `FinetuneOptions`.
        seed: of what adapters draw in each step. lr_ratio: LoRA+'s λ, the learning rate of B over that of A.
    """

    def __init__(
        self,
        model: OrcaModel,
        task: Task,
        optimizer: partial,
        options: FinetuneOptions,
        seed: int,
        lr_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.task, self.make_optimizer, self.options = model, task, optimizer, options
        self.seed, self.lr_ratio = seed, lr_ratio
        self.strict_loading = False  # checkpoints leave out what is frozen
        self.draws = torch.Generator().manual_seed(seed)
        self.steps = adapters.Steps(model.body)
        self.mean = RunningMean()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Dropout and adapters draw the same after a resume, whatever was drawn before it.
        torch.manual_seed(self.seed * 1_000_003 + self.current_epoch * 100_003 + batch_index)
        if batch_index % self.trainer.accumulate_grad_batches == 0:  # one draw per optimiser step, as DyLoRA
            self.draws.manual_seed(self.seed * 1_000_003 + self.global_step)
            self.steps.begin(self.draws)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, y = batch
        loss = self.task.loss(self(x), y)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss.item()} in epoch {self.current_epoch}, batch {batch_index}: lower "
                f"finetune.optimizer.lr or set finetune.clip=1.0"
            )
        self.mean.add(loss, len(x))
        if self.trainer.is_last_batch:  # once an epoch: Lightning takes milliseconds for every value it is given
            self.log("train/loss", self.mean.take(), on_step=False, on_epoch=True, batch_size=1, prog_bar=True)
        return loss + self.steps.extra_loss()

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        self.steps.end()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        x, y = batch
        prediction = self(x)
        name = f"{split}/{self.task.metric_name}"
        self.log(name, self.task.metric(prediction, y).mean(), batch_size=len(x), prog_bar=True)
        for further, values in self.task.further(prediction, y).items():
            self.log(f"{split}/{further}", values.nanmean(), batch_size=len(x))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make_optimizer(self.parameter_groups())
        steps = int(self.trainer.estimated_stepping_batches)
        self.steps.run_of(steps)
        course = self.options.course(steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: course.factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, each part at its own learning rate: adapter (or body), embedder, predictor."""
        lr = float(self.make_optimizer.keywords["lr"])
        groups = adapters.parameter_groups(self.model.body, lr=lr, ratio=self.lr_ratio)
        rates = {"embedder": self.options.embedder_lr, "predictor": self.options.predictor_lr}
        for name, own in rates.items():
            trained = [p for p in getattr(self.model, name).parameters() if p.requires_grad]
            if trained:
                groups.append({"name": name, "params": trained, "lr": lr if own is None else own})
        return groups

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = trained_tensors(self.model)
        checkpoint["state_dict"] = {f"model.{name}": value for name, value in kept.items()}
        checkpoint["steps"] = self.steps.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps.load_state_dict(checkpoint["steps"])


def trained_tensors(model: OrcaModel) -> dict[str, Tensor]:
    """Everything of a model that training changes: trainable parameters and what adapters say they change besides."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainable |= {f"body.{name}" for name in adapters.adapter_state_dict(model.body)}
    return {name: value for name, value in model.state_dict().items() if name in trainable}

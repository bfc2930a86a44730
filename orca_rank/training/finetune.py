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
from orca_rank.data.shares import sizes_of
from orca_rank.options import flag, number, one_of, whole
from orca_rank.processes import world
from orca_rank.task import Task
from orca_rank.training.average import Average
from orca_rank.training.compiled import check_backend
from orca_rank.training.curve import RunningMean
from orca_rank.training.optimizers import made
from orca_rank.training.pare import PaRe, PareOptions, Place
from orca_rank.training.schedule import SCHEDULES, Schedule
from orca_rank.training.stochastic_depth import SharedPaths

REDUCTIONS = ("mean", "sum", "batches")


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune; `conf/config.yaml` says what each option is.

    Raises:
        ValueError: for a value that means nothing, naming the option.
    """

    epochs: int
    accumulate: int = 1
    reduction: str = "mean"
    clip: float | None = None
    schedule: str = "linear"
    warmup: float = 0.05
    warmup_epochs: float | None = None
    decay: float = 0.2
    decay_epochs: float | None = None
    patience: int | None = None
    predictor_lr: float | None = None
    embedder_lr: float | None = None
    keep_update: bool = False
    ema: float | None = None
    compile: str | None = None
    cache: float = 1.0
    curriculum: PareOptions | None = None

    def __post_init__(self) -> None:
        whole("finetune.epochs", self.epochs)
        whole("finetune.accumulate", self.accumulate)
        one_of("finetune.reduction", self.reduction, REDUCTIONS)
        number("finetune.clip", self.clip, above=0, null=True)
        one_of("finetune.schedule", self.schedule, SCHEDULES)
        number("finetune.warmup", self.warmup, least=0, most=1)
        number("finetune.warmup_epochs", self.warmup_epochs, least=0, most=self.epochs, null=True)
        number("finetune.decay", self.decay, least=0, most=1)
        number("finetune.decay_epochs", self.decay_epochs, least=self.epochs, null=True)
        if self.decay_epochs is not None and self.schedule not in ("linear", "cosine"):
            raise ValueError(
                f"finetune.decay_epochs={self.decay_epochs} is the length of a linear or cosine course, and "
                f"finetune.schedule={self.schedule}: set finetune.decay_epochs=null, or schedule=linear"
            )
        whole("finetune.patience", self.patience, null=True)
        number("finetune.predictor_lr", self.predictor_lr, above=0, null=True)
        number("finetune.embedder_lr", self.embedder_lr, above=0, null=True)
        flag("finetune.keep_update", self.keep_update)
        number("finetune.ema", self.ema, above=0, below=1, null=True)
        check_backend(self.compile)
        number("finetune.cache", self.cache, least=0)

    def course(self, steps: float) -> Schedule:
        """The learning rates of a run of so many optimiser steps."""
        warmup = self.warmup if self.warmup_epochs is None else self.warmup_epochs / self.epochs
        whole = steps if self.decay_epochs is None else steps * self.decay_epochs / self.epochs
        return Schedule(self.schedule, whole, warmup * steps, self.decay * steps)


class FineTune(L.LightningModule):
    """One training step of the adapted model.

    Args:
        model: with exactly the parameters to train set to require gradients. task: loss and metric.
        optimizer: takes parameter groups; its lr is the adapter's, or the body's. options: see `FinetuneOptions`.
        seed: of what adapters draw in each step. lr_ratio: LoRA+'s λ, the learning rate of B over that of A.
        curriculum: adds a term to the loss, and is trained with the model, at the predictor's learning rate.
    """

    def __init__(
        self,
        model: OrcaModel,
        task: Task,
        optimizer: partial,
        options: FinetuneOptions,
        seed: int,
        lr_ratio: float = 1.0,
        curriculum: PaRe | None = None,
    ) -> None:
        super().__init__()
        self.model, self.task, self.make_optimizer, self.options = model, task, optimizer, options
        self.seed, self.lr_ratio, self.curriculum = seed, lr_ratio, curriculum
        self.strict_loading = False  # checkpoints leave out what is frozen
        self.draws = torch.Generator().manual_seed(seed)
        self.steps = adapters.Steps(model.body)
        self.mean, self.mixed = RunningMean(), RunningMean()
        self.scores: dict[str, RunningMean] = {}
        rank, size, _ = world()
        self.paths = SharedPaths(model, rank, size) if size > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Dropout and adapters draw the same after a resume, whatever was drawn before it. Adapters draw the same in
        # every process, and stochastic depth what one process would; dropout does not: its samples are others.
        seed, sizes = self._seed(batch_index), sizes_of(self.trainer.train_dataloader)
        torch.manual_seed(seed + 7_368_787 * world().rank)
        if self.paths is not None and sizes is not None:
            self.paths.begin(seed, sizes.batch(batch_index), self.device)
        if batch_index % self.trainer.accumulate_grad_batches == 0:  # one draw per optimiser step, as DyLoRA
            self.draws.manual_seed(self.seed * 1_000_003 + self.global_step)
            self.steps.begin(self.draws)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        if world().size > 1:  # a loader that draws its order from here draws the same everywhere
            torch.manual_seed(self._seed(batch_index))

    def _seed(self, batch_index: int) -> int:
        return self.seed * 1_000_003 + self.current_epoch * 100_003 + batch_index

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, y = batch
        own, weight, once = self._weights(batch_index, len(x))
        if self.curriculum is None:
            loss = mean = self.task.loss(self(x), y)
        else:
            tokens = self.model.embedder(x)
            mean = self.task.loss(self.model.head(tokens), y)
            term = self.curriculum(self.model, tokens, y, *self._place(batch_index, len(x)))
            loss = mean + term
            self.mixed.add(term, own)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss.item()} in epoch {self.current_epoch}, batch {batch_index}: lower "
                f"finetune.optimizer.lr or set finetune.clip=1.0"
            )
        self.mean.add(mean, own)
        if self.trainer.is_last_batch:  # once an epoch: Lightning takes milliseconds for every value it is given
            self.log("train/loss", self.mean.take(), on_step=False, on_epoch=True, batch_size=1, prog_bar=True)
            if self.curriculum is not None:
                self.log("train/curriculum", self.mixed.take(), on_step=False, on_epoch=True, batch_size=1)
        return weight * loss + once * self.steps.extra_loss()

    def _place(self, batch_index: int, samples: int) -> tuple[Place, int]:
        """(where the run is, samples of a full batch), for the curriculum."""
        (rank, size, _), sizes = world(), sizes_of(self.trainer.train_dataloader)
        whole = samples if sizes is None else sizes.batch(batch_index)
        return Place(self.current_epoch, batch_index, whole, rank, size), samples if sizes is None else sizes.batch_size

    def _weights(self, batch_index: int, samples: int) -> tuple[int, float, float]:
        """(own samples, factor of the mean loss over them, factor of a term that is no mean over samples).

        Lightning divides what a step returns by the batches of an optimiser step, of which an epoch's last may have
        fewer, and averages over the processes. With these factors the gradient of an optimiser step is that of the
        mean over all samples that it sees, each counting the same; with finetune.reduction=sum of the sum over them,
        with batches of the sum of its batches' means.
        """
        accumulate, (rank, size, _) = self.trainer.accumulate_grad_batches, world()
        sizes, batches = sizes_of(self.trainer.train_dataloader), int(self.trainer.num_training_batches)
        if sizes is None:  # batches of a loader of the user's own count the same
            start = batch_index - batch_index % accumulate
            among = min(start + accumulate, batches) - start
            divisor = {"mean": among, "sum": 1 / samples, "batches": 1}[self.options.reduction]
            return samples, accumulate / divisor, accumulate / among
        own = sizes.own(batch_index, rank, size)
        total, among = sizes.window(batch_index, batches, accumulate)
        divisor = {"mean": total, "sum": 1, "batches": sizes.batch(batch_index)}[self.options.reduction]
        return own, accumulate * size * own / divisor, accumulate / among

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        self.steps.end()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, batch_index, "val", self.trainer.val_dataloaders)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, batch_index, "test", self.trainer.test_dataloaders)

    def on_validation_epoch_end(self) -> None:
        self._log_scores()

    def on_test_epoch_end(self) -> None:
        self._log_scores()

    def _evaluate(self, batch: tuple[Tensor, Tensor], batch_index: int, split: str, loader: Any) -> None:
        x, y = batch
        sizes, (rank, size, _) = sizes_of(loader), world()
        own = len(x) if sizes is None else sizes.own(batch_index, rank, size)
        prediction = self(x)
        self._score(f"{split}/{self.task.metric_name}", self.task.metric(prediction, y).mean(), own)
        for name, values in self.task.further(prediction, y).items():
            there = ~values.isnan()  # of a sample whose target misses it there is none
            mean = torch.where(there, values, 0.0).sum() / there.sum().clamp(min=1)
            self._score(f"{split}/{name}", mean, int(there.sum()) if own else 0)

    def _score(self, name: str, mean: Tensor, samples: int) -> None:
        self.scores.setdefault(name, RunningMean()).add(mean, samples)

    def _log_scores(self) -> None:
        """The means over all samples, every one counted once, whichever process saw it."""
        for name, mean in self.scores.items():
            self.log(name, mean.take(), batch_size=1, prog_bar=name.endswith(self.task.metric_name))
        self.scores = {}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = made(self.make_optimizer, self.parameter_groups(), self)
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
        if self.curriculum is not None:
            own, trained = rates["predictor"], [p for p in self.curriculum.parameters() if p.requires_grad]
            groups.append({"name": "curriculum", "params": trained, "lr": lr if own is None else own})
        return groups

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = trained_tensors(self.model)
        checkpoint["state_dict"] = {f"model.{name}": value for name, value in kept.items()}
        if self.curriculum is not None:
            trained = [name for name, value in self.curriculum.named_parameters() if value.requires_grad]
            state = self.curriculum.state_dict()
            checkpoint["state_dict"] |= {f"curriculum.{name}": state[name] for name in trained}
        checkpoint["steps"] = self.steps.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps.load_state_dict(checkpoint["steps"])


def trained_tensors(model: OrcaModel) -> dict[str, Tensor]:
    """Everything of a model that training changes: trainable parameters and what adapters say they change besides."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainable |= {f"body.{name}" for name in adapters.adapter_state_dict(model.body)}
    return {name: value for name, value in model.state_dict().items() if name in trainable}


def average_of(model: OrcaModel, decay: float) -> Average:
    """The moving average of `trained_tensors`."""
    steps = adapters.Steps(model.body)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    learned |= {f"body.{name}" for name in steps.learned_buffers()}

    def renewed() -> dict[str, Tensor]:
        return {f"body.{name}": mask for name, mask in steps.renewed().items()}

    return Average(decay, lambda: trained_tensors(model), learned, renewed)

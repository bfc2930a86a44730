"""The LightningModule of stage=align, and its options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from orca_rank.artifacts.files import write_tensors
from orca_rank.options import number, one_of, whole
from orca_rank.processes import first, gathered, world
from orca_rank.training.curve import RunningMean
from orca_rank.training.features import token_mean
from orca_rank.training.optimizers import made

Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Decay:
    """The learning rate times `factor` every so many epochs."""

    every: int
    factor: float

    def __post_init__(self) -> None:
        whole("align.decay.every", self.every)
        number("align.decay.factor", self.factor, above=0, most=1)


@dataclass(frozen=True)
class RandomTokens:
    """Source tokens in place of target tokens at random places at the start of alignment, fewer and fewer: a curriculum
    of ours. PaRe, which chooses the tokens by a gate and acts in fine-tuning, is `finetune/curriculum=pare`.

    Args:
        start: share of the tokens in the first epoch; 0 turns it off. until: share of the epochs after which nothing is
            replaced. pool: source images that lend tokens.
    """

    start: float
    until: float
    pool: int

    def __post_init__(self) -> None:
        number("align.random_tokens.start", self.start, least=0, most=1)
        number("align.random_tokens.until", self.until, least=0, most=1)
        whole("align.random_tokens.pool", self.pool)

    def fraction(self, epoch: int, epochs: int) -> float:
        """Share of target tokens replaced in an epoch: from `start` linearly to 0 at `until` · epochs."""
        return self.start * max(0.0, 1 - epoch / max(1.0, self.until * epochs))


@dataclass(frozen=True)
class HeldOut:
    """Validation images that the distance before and after is taken on, and half-samples for its interval."""

    samples: int
    resamples: int

    def __post_init__(self) -> None:
        whole("align.held_out.samples", self.samples, 4)
        whole("align.held_out.resamples", self.resamples, 0)


@dataclass(frozen=True)
class AlignOptions:
    """How to align; `conf/align/none.yaml` says what each option is.

    Raises:
        ValueError: for a value that means nothing, naming the option.
    """

    schedule: str
    epochs: int
    samples_per_class: int
    batch_size: int
    source_samples: int
    clusters: int
    decay: Decay
    patience: int | None
    min_delta: float
    random_tokens: RandomTokens
    held_out: HeldOut

    def __post_init__(self) -> None:
        one_of("align.schedule", self.schedule, ("orca", "batch"))
        for name in ("epochs", "samples_per_class", "batch_size", "source_samples", "clusters"):
            whole(f"align.{name}", getattr(self, name))
        whole("align.patience", self.patience, null=True)
        number("align.min_delta", self.min_delta, least=0)


class Target(NamedTuple):
    """The target's training samples: a dataset of (x, y), how its batches are put together, and labels (n,)."""

    dataset: Dataset
    collate: Callable[..., Any]
    labels: Tensor

    def share(self, label: int) -> float:
        """Share of a class among the samples, n_i / N."""
        return float((self.labels == label).float().mean())


class Align(L.LightningModule):
    """Trains the embedder alone on batches of one class (schedule="orca") or of all (schedule="batch").

    Args:
        embedder: images -> tokens. objective: (features, labels) -> scalar. target: what to align.
        tokens: (p, T, d) of source images, to replace with. optimizer: takes parameters.
        options: see `AlignOptions`. folder: for the batch of a loss that is not finite. seed: of every order and draw.
    """

    def __init__(
        self,
        embedder: nn.Module,
        objective: Objective,
        target: Target,
        tokens: Tensor,
        optimizer: partial,
        options: AlignOptions,
        *,
        folder: Path,
        seed: int,
    ) -> None:
        super().__init__()
        self.embedder, self.objective, self.target, self.tokens = embedder, objective, target, tokens
        self.make_optimizer, self.options, self.folder, self.seed = optimizer, options, folder, seed
        self.batches: list[list[int]] = []
        self.mean = RunningMean()

    @property
    def batches_a_step(self) -> int:
        """Batches whose gradients an optimiser step adds up: with schedule="orca" all of an epoch."""
        return len(self.target.labels.unique()) if self.options.schedule == "orca" else 1

    def train_dataloader(self) -> DataLoader:
        """Made anew each epoch, from the epoch's own seed, so that a resumed run sees the same batches."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.trainer.current_epoch)
        labels = self.target.labels
        if self.options.schedule == "orca":
            self.batches = list(class_batches(labels, self.options.samples_per_class, generator))
        else:
            order = torch.randperm(len(labels), generator=generator)
            self.batches = [part.tolist() for part in order.split(self.options.batch_size)]
        rank, size, _ = world()
        own = [batch[rank::size] or batch[:1] for batch in self.batches]  # all processes take part in every step
        return DataLoader(self.target.dataset, batch_sampler=own, collate_fn=self.target.collate)

    def features(self, x: Tensor, batch_index: int) -> Tensor:
        """Token means of the whole batch, some target tokens replaced by source tokens at the start;
        those of other processes without a gradient.

        Args:
            x: this process's share of the batch.
        """
        rank, size, _ = world()
        tokens = self.embedder(x).flatten(1, -2)  # (B, ..., d) -> (B, T, d)
        fraction = self.options.random_tokens.fraction(self.current_epoch, self.options.epochs)
        replaced = round(fraction * tokens.shape[1])
        if replaced:
            draw = torch.Generator().manual_seed((self.seed * 1_000_003 + self.current_epoch) * 1_009 + batch_index)
            image = torch.randint(len(self.tokens), (len(self.batches[batch_index]),), generator=draw)
            image = image[rank::size] if len(image) > rank else image[:1]
            place = torch.randperm(tokens.shape[1], generator=draw)[:replaced]
            tokens = tokens.index_copy(1, place.to(x.device), self.tokens[image][:, place].to(tokens))
        return gathered(token_mean(tokens), len(self.batches[batch_index]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, _ = batch
        label = self.target.labels[torch.tensor(self.batches[batch_index])].to(x.device)
        features = self.features(x, batch_index)
        if bool(torch.isfinite(features).all()):
            loss = self.objective(features, label)
            if bool(torch.isfinite(loss)):
                if self.options.schedule == "orca":  # Lightning averages over the batches of an optimiser step
                    loss = loss * self.target.share(int(label[0])) * len(self.batches)
                self.mean.add(loss)
                if self.trainer.is_last_batch:  # once an epoch: Lightning takes milliseconds for every value
                    self.log("loss", self.mean.take(), on_step=False, on_epoch=True, batch_size=1, prog_bar=True)
                # Lightning averages gradients over the processes, each of which has its share of them.
                return world().size * loss
        path = self.folder / "bad_batch.safetensors"
        if first():
            write_tensors(path, {"x": x, "label": label, "features": features})
        raise FloatingPointError(
            f"the alignment loss is not finite in epoch {self.current_epoch}, batch {batch_index}; its images, labels "
            f"and features are in {path}: lower align.optimizer.lr"
        )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = made(self.make_optimizer, self.embedder.parameters(), self)
        decay = self.options.decay
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, decay.every, decay.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


def class_batches(labels: Tensor, most: int, generator: torch.Generator) -> Iterator[list[int]]:
    """For each class, in random order, up to `most` of its samples drawn without replacement."""
    values = labels.unique()
    for value in values[torch.randperm(len(values), generator=generator)]:
        members = torch.nonzero(labels == value).flatten()
        yield members[torch.randperm(len(members), generator=generator)[:most]].tolist()

"""The LightningModule of stage=align."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from orca_rank.artifacts.files import write_csv, write_tensors
from orca_rank.training.features import Source, token_mean

Objective = Callable[[Tensor, Tensor], Tensor]


class Align(L.LightningModule):
    """Trains the embedder alone on batches of one class (schedule="orca") or of all (schedule="batch").

    Args:
        embedder: images -> tokens. objective: (features, labels) -> scalar. dataset, collate: the target.
        labels: (n,) of the target's training samples. source: gives the tokens of the curriculum.
        optimizer: takes parameters. settings: the align config. folder: for the batch of a loss that is not finite.
        seed: of every order and draw. mark: a key of the run's options, kept in checkpoints.
    """

    def __init__(
        self,
        embedder: nn.Module,
        objective: Objective,
        dataset: Dataset,
        collate: Any,
        labels: Tensor,
        source: Source,
        optimizer: Any,
        settings: Mapping[str, Any],
        folder: Path,
        seed: int,
        mark: str,
    ) -> None:
        super().__init__()
        self.embedder, self.objective, self.dataset, self.collate = embedder, objective, dataset, collate
        self.labels, self.source, self.make_optimizer, self.settings = labels, source, optimizer, settings
        self.folder, self.seed, self.mark = folder, seed, mark

    def train_dataloader(self) -> DataLoader:
        """Made anew each epoch, from the epoch's own seed, so that a resumed run sees the same batches."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.trainer.current_epoch)
        if self.settings["schedule"] == "orca":
            batches = list(class_batches(self.labels, self.settings["samples_per_class"], generator))
        else:
            order = torch.randperm(len(self.labels), generator=generator)
            batches = [part.tolist() for part in order.split(self.settings["batch_size"])]
        self.batches = batches
        return DataLoader(self.dataset, batch_sampler=batches, collate_fn=self.collate)

    def share(self, label: int) -> float:
        """Share of a class among the training samples, n_i / N."""
        return float((self.labels == label).float().mean())

    def features(self, x: Tensor, batch_index: int) -> Tensor:
        """Token means, some target tokens replaced by source tokens at the start of a curriculum (PaRe)."""
        tokens = self.embedder(x).flatten(1, -2)  # (B, ..., d) -> (B, T, d)
        fraction = curriculum_fraction(self.settings["curriculum"], self.current_epoch, self.settings["epochs"])
        replaced = round(fraction * tokens.shape[1])
        if replaced:
            draw = torch.Generator().manual_seed((self.seed * 1_000_003 + self.current_epoch) * 1_009 + batch_index)
            image = torch.randint(len(self.source.tokens), (len(x),), generator=draw)
            place = torch.randperm(tokens.shape[1], generator=draw)[:replaced]
            tokens = tokens.index_copy(1, place.to(x.device), self.source.tokens[image][:, place].to(tokens))
        return token_mean(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, _ = batch
        label = self.labels[torch.tensor(self.batches[batch_index])].to(x.device)
        features = self.features(x, batch_index)
        if bool(torch.isfinite(features).all()):
            loss = self.objective(features, label)
            if bool(torch.isfinite(loss)):
                if self.settings["schedule"] == "orca":  # Lightning averages over the batches of an optimiser step
                    loss = loss * self.share(int(label[0])) * len(self.batches)
                self.log("loss", loss, on_step=False, on_epoch=True, batch_size=1, prog_bar=True)
                return loss
        path = self.folder / "bad_batch.safetensors"
        write_tensors(path, {"x": x, "label": label, "features": features})
        raise FloatingPointError(
            f"the alignment loss is not finite in epoch {self.current_epoch}, batch {batch_index}; its images, labels "
            f"and features are in {path}: lower align.optimizer.lr"
        )

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer(self.embedder.parameters())
        decay = self.settings["decay"]
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, decay["every"], decay["factor"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mark"] = self.mark


def class_batches(labels: Tensor, most: int, generator: torch.Generator) -> Iterator[list[int]]:
    """For each class, in random order, up to `most` of its samples drawn without replacement."""
    values = labels.unique()
    for value in values[torch.randperm(len(values), generator=generator)]:
        members = torch.nonzero(labels == value).flatten()
        yield members[torch.randperm(len(members), generator=generator)[:most]].tolist()


def curriculum_fraction(curriculum: Mapping[str, Any], epoch: int, epochs: int) -> float:
    """Share of target tokens replaced in an epoch: from `start` linearly to 0 at `until` · epochs."""
    end = max(1.0, curriculum["until"] * epochs)
    return curriculum["start"] * max(0.0, 1 - epoch / end)


class Curve(Callback):
    """curve.csv with the columns epoch, loss, lr; rewritten whole, so that a resumed run goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self.path, self.lr = path, 0.0
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "loss": float(trainer.callback_metrics["loss"]), "lr": self.lr}
        self.rows.append(row)
        write_csv(self.path, self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

"""stage=align: train a new embedder so that the target's features look like the source's (ORCA, section 3.2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from orca_rank.artifacts import finished, key, plain, select, stage_folder, write_csv, write_json, write_tensors
from orca_rank.backbone import create_model
from orca_rank.build import build
from orca_rank.stages.features import (
    Labeller,
    Source,
    embed,
    plain_loader,
    prepared,
    source_features,
    targets,
    token_mean,
)
from orca_rank.stages.held_out import Distances, compare, sentence
from orca_rank.stages.parts import aligned_embedder, close_logger, contents, device_of, resolve_backbone

console = Console()
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


def run(config: DictConfig) -> None:
    """Align as configured and write align/embedder.safetensors, curve.csv and metrics.json.

    Raises:
        ValueError: an unknown schedule or option. FloatingPointError: a loss that is not finite.
    """
    options = plain(config.align)
    if options["schedule"] not in ("orca", "batch"):
        raise ValueError(f"align.schedule must be orca or batch, received {options['schedule']!r}")
    if not 0 <= options["curriculum"]["start"] <= 1:
        raise ValueError(f"align.curriculum.start must lie in [0, 1], received {options['curriculum']['start']}")
    folder = stage_folder(config, "align")
    made_from = {**select(config, "data", "source", "backbone", "seed", "align"), "init": config.embedder.init}
    made_from["contents"] = contents(config, "data", "source")
    if finished(folder / "metrics.json", made_from, force=config.force, made_by="stage=align"):
        console.print(f"align is done: {folder / 'metrics.json'} (force=true redoes it)", soft_wrap=True)
        return

    L.seed_everything(config.seed, verbose=False)
    data = prepared(config.data)
    torch.manual_seed(config.seed)  # as for the model that is fine-tuned later
    embedder = create_model(resolve_backbone(config), data.task, config.embedder.init).embedder
    device = device_of(config)
    source = source_features(config, device)
    train = plain_loader(data, "train", 64)
    y = targets(train.dataset, train.collate_fn)
    labeller = Labeller(y, options["clusters"], int(config.seed))
    labels = labeller(y)
    console.print(
        f"source: {len(source.features)} images, {len(source.labels.unique())} classes; target: {len(labels)} images, "
        f"{len(labels.unique())} {'clusters' if y.is_floating_point() else 'classes'}; objective {_name(options)}"
    )

    def held_out() -> Distances:
        features, y = embed(embedder, plain_loader(data, "val", 64), options["held_out"]["samples"], device)
        return compare(source, features, labeller(y), options["held_out"], int(config.seed))

    started = time.perf_counter()
    before = held_out()
    epochs = 0
    if options["objective"] is not None:
        objective = build(config.align.objective, source=source.features.to(device), label=source.labels.to(device))
        module = Align(
            embedder, objective, train.dataset, train.collate_fn, labels, source,
            build(config.align.optimizer), options, folder, int(config.seed), key(made_from),
        )  # fmt: skip
        epochs = _fit(config, module, folder)
    after = held_out() if epochs else before
    distances = {name: {"before": before[name], "after": after[name]} for name in before}
    write_tensors(aligned_embedder(config), embedder.state_dict())
    payload = {
        "objective": _name(options),
        "distances": distances,
        "epochs": epochs,
        "seconds": time.perf_counter() - started,
        "source_images": len(source.features),
        "target_images": len(labels),
        "target_classes": len(labels.unique()),
    }
    write_json(folder / "metrics.json", payload, config=made_from, inputs=[aligned_embedder(config)])
    (folder / "last.ckpt").unlink(missing_ok=True)
    console.print(sentence(distances), soft_wrap=True)


def _name(options: Mapping[str, Any]) -> str:
    return options["objective"]["_target_"].rpartition(".")[2].lower() if options["objective"] else "none"


def _fit(config: DictConfig, module: Align, folder: Path) -> int:
    """Train, from the last checkpoint where there is one; the number of epochs done."""
    last = folder / "last.ckpt"
    if config.force:
        last.unlink(missing_ok=True)
    if last.exists():
        found = torch.load(last, map_location="cpu", weights_only=False)["mark"]
        if found != module.mark:
            raise ValueError(f"{last} was left by other options: add force=true to start again, or run=<another name>")
        console.print(f"going on from {last}", soft_wrap=True)
    callbacks: list[Callback] = [
        ModelCheckpoint(folder, "last", save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True),
        Curve(folder / "curve.csv"),
    ]
    if config.align.patience is not None:
        callbacks.append(
            EarlyStopping("loss", min_delta=config.align.min_delta, patience=config.align.patience,
                          check_on_train_epoch_end=True)
        )  # fmt: skip
    classes = len(module.labels.unique())
    trainer = build(
        config.trainer,
        max_epochs=config.align.epochs,
        accumulate_grad_batches=classes if config.align.schedule == "orca" else 1,
        reload_dataloaders_every_n_epochs=1,
        default_root_dir=str(folder),
        callbacks=callbacks,
        logger=build(config.logger, save_dir=str(folder / "log")) if config.logger else False,
    )
    module.embedder.train()
    trainer.fit(module, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    close_logger(trainer)
    return trainer.current_epoch

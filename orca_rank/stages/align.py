"""stage=align: train a new embedder so that the target's features look like the source's (ORCA, section 3.2)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig
from rich.console import Console

from orca_rank.artifacts.files import read_tensors, write_json, write_tensors
from orca_rank.artifacts.provenance import finished, key, plain, select
from orca_rank.backbone import create_model, weights_hash
from orca_rank.build import build
from orca_rank.measuring.classes import Labeller
from orca_rank.measuring.passes import limited
from orca_rank.stages.setup import (
    aligned_embedder,
    close_logger,
    contents,
    device_of,
    ready,
    resolve_backbone,
    source_side,
    stage_folder,
)
from orca_rank.training.align import Align, Curve
from orca_rank.training.features import Source, embed, plain_loader, targets
from orca_rank.training.held_out import Distances, compare, sentence

console = Console()


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
    data = ready(config.data)
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


def source_features(config: DictConfig, device: torch.device) -> Source:
    """Features of up to align.source_samples source images through the pretrained embedder, cached.

    The cache is keyed by the source, the backbone with the embedder's weights, and the number of images. A source that
    comes embedded needs none.
    """
    options = config.align
    pool = int(options.curriculum.pool) if options.curriculum.start > 0 else 0
    backbone = resolve_backbone(config)
    data = build(config.source)
    embedder = source_side(backbone, int(config.seed), data).embedder
    if getattr(data, "embedded", False):
        tokens = torch.cat([x.flatten(1, -2) for x, _ in limited(plain_loader(data, "train", 64), max(pool, 1))])
        return Source(*data.means(int(options.source_samples)), tokens[:pool])
    name = key(
        {
            "source": plain(config.source),
            "contents": getattr(data, "contents", None),
            "backbone": backbone,
            "weights": weights_hash(embedder),
            "n": options.source_samples,
            "clusters": options.clusters,
            "pool": pool,
        }
    )
    path = Path(config.paths.cache) / "source_features" / f"{name}.safetensors"
    if not path.exists():
        loader = plain_loader(ready(config.source), "train", 64)
        features, y = embed(embedder, loader, int(options.source_samples), device)
        tokens = features.new_zeros(0, 1, features.shape[1])
        if pool:
            images = torch.cat([x for x, _ in limited(loader, pool)])
            with torch.no_grad():
                tokens = torch.cat([embedder(x.to(device)).flatten(1, -2).cpu() for x in images.split(16)])
        labels = Labeller(y, int(options.clusters), int(config.seed))(y)
        write_tensors(path, {"features": features, "labels": labels, "tokens": tokens.float()})
    return Source(**read_tensors(path, "stage=align"))

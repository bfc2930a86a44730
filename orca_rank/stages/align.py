"""stage=align: train a new embedder so that the target's features look like the source's (ORCA, section 3.2)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from rich.console import Console

from orca_rank.artifacts.files import read_tensors, write_json, write_tensors
from orca_rank.artifacts.provenance import finished, key, plain, select
from orca_rank.artifacts.shared import making
from orca_rank.artifacts.unfinished import begin, finish, tidy
from orca_rank.backbone import create_model, weights_hash
from orca_rank.build import build
from orca_rank.measuring.classes import Labeller
from orca_rank.measuring.passes import limited
from orca_rank.options import read
from orca_rank.processes import agreed, first, first_alone
from orca_rank.stages.setup import (
    aligned_embedder,
    bare_layers,
    check,
    contents,
    held,
    ready,
    resolve_backbone,
    seed_everything,
    source_side,
    stage_folder,
)
from orca_rank.stages.tracking import job_of, show, show_in
from orca_rank.stages.trainer import callbacks_of, check_optimizer, device_of, logged, trainer_for
from orca_rank.tracking.page import Page
from orca_rank.tracking.pages import align_page
from orca_rank.training.align import Align, AlignOptions, Target
from orca_rank.training.curve import Curve, Rates
from orca_rank.training.features import Source, embed, plain_loader, targets
from orca_rank.training.held_out import Distances, compare, sentence
from orca_rank.training.keep import Keep, checkpoint_of, fit

console = Console(markup=False)
RESULTS = ("metrics.json", "curve.csv", "embedder.safetensors", "bad_batch.safetensors", "log")


def check_options(config: DictConfig) -> AlignOptions:
    """The options of this stage, checked.

    Raises:
        ValueError: for a value that means nothing.
    """
    check(config)
    values = plain(config.align)
    check_optimizer(values.pop("optimizer"), "align.optimizer")
    if (objective := values.pop("objective")) is not None:
        _try_out(objective)
    bare_layers(config)
    return read(AlignOptions, values, "align")


def _try_out(objective: Mapping[str, Any]) -> None:
    """Refuse options of an objective that it cannot be built or called with; of one's own, those that it has not."""
    if not objective["_target_"].startswith("orca_rank."):
        build(objective, _partial_=True)
        return
    x, label = torch.arange(16.0).reshape(8, 2).sin(), torch.arange(8) % 2
    build(objective, source=x, label=label)(x + 1, label)


def run(config: DictConfig) -> None:
    """Align as configured and write align/embedder.safetensors, curve.csv and metrics.json.

    Raises:
        ValueError: a bad option. FloatingPointError: a loss that is not finite. BlockingIOError: another process is at
            work in the folder.
    """
    options = check_options(config)
    folder = stage_folder(config, "align")
    made_from = {**select(config, "data", "source", "backbone", "seed", "align"), "init": config.embedder.init}
    if config.callbacks:
        made_from["callbacks"] = plain(config.callbacks)
    made_from["contents"] = contents(config, "data", "source", "backbone")

    def done() -> bool:
        return agreed(lambda: finished(folder / "metrics.json", made_from, force=config.force, made_by="stage=align"))

    if not done():
        with held(folder):
            if not done():
                _align(config, options, folder, made_from)
                return
    if first():
        tidy(folder)
    console.print(f"align is done: {folder / 'metrics.json'} (force=true redoes it)", soft_wrap=True)


def _align(config: DictConfig, options: AlignOptions, folder: Path, made_from: Mapping[str, Any]) -> None:
    seed = int(config.seed)
    seed_everything(seed)
    with first_alone():
        data = ready(config.data)
    backbone = resolve_backbone(config)
    torch.manual_seed(seed)  # as for the model that is fine-tuned later
    embedder = create_model(backbone, data.task, config.embedder.init).embedder
    device = device_of(config.trainer)
    begun = agreed(lambda: begin(folder, made_from, {}, force=config.force, results=RESULTS))
    with first_alone():  # the others find the features in the cache
        source = source_features(config, device)
    train = plain_loader(data, "train", 64)
    y = targets(train.dataset, train.collate_fn)
    labeller = Labeller(y, options.clusters, seed)
    target = Target(train.dataset, train.collate_fn, labeller(y))
    objective = _name(config.align.objective)
    console.print(
        f"source: {len(source.features)} images, {len(source.labels.unique())} classes; target: {len(y)} images, "
        f"{len(target.labels.unique())} {'classes' if labeller.means is None else 'clusters'}; objective {objective}"
    )

    def held_out() -> Distances:
        features, y = embed(embedder, plain_loader(data, "val", 64), options.held_out.samples, device)
        return compare(source, features, labeller(y), options.held_out.resamples, seed)

    started = time.perf_counter()
    before = held_out()

    def write(after: Distances, epochs: int) -> None:
        distances = {name: {"before": before[name], "after": after[name]} for name in before}
        payload = {
            "objective": objective,
            "distances": distances,
            "epochs": epochs,
            "seconds": time.perf_counter() - started,
            "source_images": len(source.features),
            "target_images": len(y),
            "target_classes": len(target.labels.unique()),
        }
        if first():
            write_tensors(aligned_embedder(config), embedder.state_dict())
            write_json(folder / "metrics.json", payload, config=made_from, inputs=[aligned_embedder(config)])
            finish(folder)
        console.print(sentence(distances), soft_wrap=True)

    def page() -> Page:
        return align_page(folder.parent)

    if config.align.objective is None:
        write(before, 0)
        show(config, "align", folder, made_from, page)
        return
    distance = build(config.align.objective, source=source.features.to(device), label=source.labels.to(device))
    optimizer = build(config.align.optimizer)
    module = Align(embedder, distance, target, source.tokens, optimizer, options, folder=folder, seed=seed)
    trainer = _trainer(config, module, folder)
    with logged(trainer, made_from):
        fit(trainer, module, agreed(lambda: checkpoint_of(folder)) if begun else None)
        write(held_out(), trainer.current_epoch)
        show_in(trainer, page)


def _name(objective: Mapping[str, Any] | None) -> str:
    return objective["_target_"].rpartition(".")[2].lower() if objective else "none"


def _trainer(config: DictConfig, module: Align, folder: Path) -> L.Trainer:
    options = module.options
    module.embedder.train()
    return trainer_for(
        config.trainer,
        config.logger,
        folder,
        [
            *callbacks_of(config),
            Rates(),
            Curve(folder / "curve.csv", ("epoch", "loss", "lr")),
            Keep(folder, "loss", patience=options.patience, min_delta=options.min_delta),
        ],
        job_of(config, "align", folder),
        max_epochs=options.epochs,
        accumulate_grad_batches=module.batches_a_step,
        reload_dataloaders_every_n_epochs=1,
    )


def source_features(config: DictConfig, device: torch.device) -> Source:
    """Features of up to align.source_samples source images through the pretrained embedder, cached.

    The cache is keyed by the source, the backbone with the embedder's weights, and the number of images. A source that
    comes embedded needs none.
    """
    options = config.align
    pool = int(options.random_tokens.pool) if options.random_tokens.start > 0 else 0
    backbone = resolve_backbone(config)
    data = build(config.source)
    embedder = source_side(backbone, int(config.seed), data).embedder
    if getattr(data, "embedded", False):
        tokens = torch.cat([x.flatten(1, -2) for x, _ in limited(plain_loader(data, "train", 64), max(pool, 1))])
        means, labels = data.means(int(options.source_samples))
        return Source(means, labels, tokens[:pool])
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
    kept = _kept(path)
    if kept is not None:
        return kept
    with making(path):
        kept = _kept(path)  # of a run that was faster
        if kept is not None:
            return kept
        loader = plain_loader(ready(config.source), "train", 64)
        features, y = embed(embedder, loader, int(options.source_samples), device)
        tokens = features.new_zeros(0, 1, features.shape[1])
        if pool:
            images = torch.cat([x for x, _ in limited(loader, pool)])
            with torch.no_grad():
                tokens = torch.cat([embedder(x.to(device)).flatten(1, -2).cpu() for x in images.split(16)])
        source = Source(features, Labeller(y, int(options.clusters), int(config.seed))(y), tokens.float())
        write_tensors(path, source._asdict())
    return source


def _kept(path: Path) -> Source | None:
    """Source features of the cache, if they are there and whole."""
    if not path.exists():
        return None
    try:
        return Source(**read_tensors(path, "stage=align"))
    except (ValueError, TypeError):
        console.print(f"{path} is damaged and made again", soft_wrap=True)
        return None

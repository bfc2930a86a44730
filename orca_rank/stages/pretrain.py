"""stage=pretrain: supervised pretraining of a timm classifier on images, for a body to start from."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from orca_rank.artifacts.provenance import finished, plain, select
from orca_rank.backbone import source_model
from orca_rank.build import build
from orca_rank.data.embedded import write_embedded
from orca_rank.stages.setup import contents, stage_folder, trainer_options
from orca_rank.training.pretrain import pretrain_source

console = Console(highlight=False)


def run(config: DictConfig) -> None:
    """Pretrain the configured backbone on the source and write pretrain/weights.safetensors, metrics.json and
    source.npz, a sample of the source for `source=embedded`.

    Raises:
        ValueError: a source that is not a classification of images, or a backbone without a recipe.
    """
    folder, made_from = stage_folder(config, "pretrain"), select(config, "source", "backbone", "seed")
    made_from["contents"] = contents(config, "source")
    weights, sample = folder / "weights.safetensors", folder / "source.npz"
    source = build(config.source)
    done = finished(folder / "metrics.json", made_from, force=config.force, made_by="stage=pretrain")
    if done and sample.exists():
        console.print(f"pretrain is done: {weights} (force=true redoes it)", soft_wrap=True)
        return
    if not done:
        if config.force:
            (folder / "last.ckpt").unlink(missing_ok=True)
        pretrain_source(made_from["backbone"], source, folder, made_from, trainer_options(config))
    trained = {**plain(config.backbone), "pretrained": str(weights)}
    write_embedded(sample, source_model(trained).embedder, source.parts)
    console.print(f"use these weights with backbone.pretrained={weights}", soft_wrap=True)
    console.print(f"and source=embedded source.file={sample} where the images are not at hand", soft_wrap=True)

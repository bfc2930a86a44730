"""stage=pretrain: supervised pretraining of a timm classifier on images, for a body to start from."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from orca_rank.artifacts.lock import locked
from orca_rank.artifacts.provenance import finished, plain, select
from orca_rank.artifacts.unfinished import begin, finish, tidy
from orca_rank.backbone import source_model
from orca_rank.build import build
from orca_rank.data.embedded import write_embedded
from orca_rank.stages.setup import check, contents, stage_folder
from orca_rank.stages.trainer import trainer_options
from orca_rank.training.pretrain import pretrain_source, recipe_of

console = Console(highlight=False, markup=False)
RESULTS = ("metrics.json", "curve.csv", "recipe.json", "weights.safetensors", "source.npz")


def run(config: DictConfig) -> None:
    """Pretrain the configured backbone on the source and write pretrain/weights.safetensors, metrics.json and
    source.npz, a sample of the source for `source=embedded`.

    Raises:
        ValueError: a source that is not a classification of images, or a backbone without a recipe.
    """
    check(config)
    recipe_of(plain(config.backbone))
    folder, made_from = stage_folder(config, "pretrain"), select(config, "source", "backbone", "seed")
    made_from["contents"] = contents(config, "source")
    weights, sample = folder / "weights.safetensors", folder / "source.npz"
    source = build(config.source)

    def done() -> bool:
        return finished(folder / "metrics.json", made_from, force=config.force, made_by="stage=pretrain")

    if done() and sample.exists():
        tidy(folder)
        console.print(f"pretrain is done: {weights} (force=true redoes it)", soft_wrap=True)
        return
    with locked(folder):
        if not done():
            begin(folder, _fixed(made_from), {}, force=config.force, results=RESULTS)
            pretrain_source(made_from["backbone"], source, folder, made_from, trainer_options(config.trainer))
        finish(folder)
        trained = {**plain(config.backbone), "pretrained": str(weights)}
        write_embedded(sample, source_model(trained).embedder, source.parts)
    console.print(f"use these weights with backbone.pretrained={weights}", soft_wrap=True)
    console.print(f"and source=embedded source.file={sample} where the images are not at hand", soft_wrap=True)


def _fixed(made_from: dict[str, Any]) -> dict[str, Any]:
    """What may not change between an interrupted run and the one that goes on with it; the recipe checks itself."""
    backbone = {name: value for name, value in made_from["backbone"].items() if name != "recipe"}
    return {**made_from, "backbone": backbone}

"""A fine-tuned model back from its run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orca_rank.adapters import adapter_state_dict, inject
from orca_rank.artifacts.command import command
from orca_rank.artifacts.files import read_json, read_record, read_tensors
from orca_rank.backbone import OrcaModel, create_model, weights_hash
from orca_rank.build import build
from orca_rank.predictors.orca import orca
from orca_rank.ranks import RankPlan
from orca_rank.task import Normaliser, Task


class Fitted(nn.Module):
    """A fine-tuned model, its adapters in place; `orca_rank.adapters.merge(fitted.model.body)` folds them in.

    `fitted(x)` maps normalised inputs (B, C, H, W), as the data module of the run yields them, to class scores
    (B, classes) or to a field (B, c, H, W) in physical units.

    Attributes: model (OrcaModel), task (Task), metrics (what metrics.json holds).
    """

    def __init__(self, model: OrcaModel, task: Task, metrics: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.task, self.metrics = model, task, metrics

    def forward(self, x: Tensor) -> Tensor:
        return self.task.decode(self.model(x))


def load(run_folder: str | Path, tag: str | None = None) -> Fitted:
    """The model that stage=finetune left in a run folder, ready to predict.

    Args:
        run_folder: runs/<run>, or one runs/<run>/finetune/<tag>. tag: which fine-tune, where there are several.

    Raises:
        FileNotFoundError: nothing fine-tuned there. ValueError: several, and no tag to choose by.
    """
    folder = chosen_folder(Path(run_folder), tag)
    metrics = read_json(folder / "metrics.json", "stage=finetune")
    config = metrics["config"]
    tensors = read_tensors(folder / "model.safetensors", "stage=finetune")
    normaliser = None
    if "normaliser.mean" in tensors:
        normaliser = Normaliser(tensors.pop("normaliser.mean"), tensors.pop("normaliser.std"))
    task = Task.from_dict(metrics["task"], normaliser)
    with torch.random.fork_rng():
        torch.manual_seed(config["seed"])  # where the backbone's weights were random, they are drawn again
        # runs from before predictors could be chosen have ORCA's
        predictor = build(config["predictor"]["module"]) if "module" in config["predictor"] else orca
        model = create_model(metrics["backbone"]["config"], task, config["embedder"]["init"], predictor)
    if weights_hash(model.body) != metrics["backbone"]["hash"]:
        raise ValueError(
            f"the backbone's weights are not those that {folder} was fine-tuned from: its config reads "
            f"{metrics['backbone']['config']}"
        )
    if config["adapter"]["method"] == "inject":
        plan = read_record(folder / "ranks.json", "stage=finetune", RankPlan.from_dict)
        inject(model.body, plan, adapter=build(metrics["adapter_module"]))
    result = model.load_state_dict(tensors, strict=False)
    trained = {f"body.{name}" for name in adapter_state_dict(model.body)}
    missing = [name for name in result.missing_keys if name in trained or not name.startswith("body.")]
    if result.unexpected_keys or missing:
        raise ValueError(
            f"{folder / 'model.safetensors'} does not fit its own config: it lacks {missing[:3]} and has beside them "
            f"{result.unexpected_keys[:3]}; run `{command('stage=finetune', 'force=true')}`"
        )
    return Fitted(model, task, metrics).eval().requires_grad_(False)


def chosen_folder(folder: Path, tag: str | None) -> Path:
    """The folder of one finished fine-tune; arguments and errors as in `load`."""
    if (folder / "metrics.json").exists() and tag is None:
        return folder
    done = sorted(path.parent for path in (folder / "finetune").glob("*/metrics.json"))
    names = [path.name for path in done]
    if tag is not None:
        if tag not in names:
            raise FileNotFoundError(
                f"no finished fine-tune {tag!r} in {folder}, there are: {', '.join(names) or 'none'}"
            )
        return done[names.index(tag)]
    if not done:
        raise FileNotFoundError(f"no finished fine-tune in {folder}: run `{command('stage=finetune')}` first")
    if len(done) > 1:
        raise ValueError(f"{folder} holds {len(done)} fine-tunes, choose one by its tag: {', '.join(names)}")
    return done[0]

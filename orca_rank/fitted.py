"""A fine-tuned model back from its run folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orca_rank.adapters import DyLoRA, adapter_state_dict, adapters, inject
from orca_rank.artifacts.command import command
from orca_rank.artifacts.damaged import reading
from orca_rank.artifacts.files import read_json, read_record, read_tensors
from orca_rank.backbone import OrcaModel, create_model, weights_hash
from orca_rank.build import build_read
from orca_rank.normaliser import Normaliser, take_named
from orca_rank.predictors.orca import orca
from orca_rank.ranks import RankPlan
from orca_rank.task import Task


class Fitted(nn.Module):
    """A fine-tuned model, its adapters in place; `orca_rank.adapters.merge(fitted.model.body)` folds them in.

    `fitted(x)` maps normalised inputs (B, C, H, W), as the data module of the run yields them, to class scores
    (B, classes) or (B, classes, H, W), the probabilities of labels (B, labels), or a vector (B, k) or field
    (B, c, H, W) in physical units; `fitted.predict(x)` does so from inputs as files hold them, which it normalises by
    the statistics of the training data.

    Attributes: model (OrcaModel), task (Task), metrics (what metrics.json holds), inputs (the statistics that the
        training data's inputs were normalised by, None where they were not).
    """

    def __init__(self, model: OrcaModel, task: Task, metrics: dict[str, Any], inputs: Normaliser | None = None) -> None:
        super().__init__()
        self.model, self.task, self.metrics, self.inputs = model, task, metrics, inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.task.decode(self.model(x))

    def predict(self, x: Tensor) -> Tensor:
        """What `fitted(x)` gives, for inputs (B, C, H, W) in the unit of the training data.

        Raises:
            ValueError: inputs of other channels, or a dataset that does more than normalise (the coordinates of
                Darcy's): there, take batches of its data module and call `fitted(x)`.
        """
        if self.inputs is not None:
            self.inputs.check(tuple(x.shape[1:]))
            x = self.inputs.encode(x)
        self.check(x)
        return self(x)

    def nested(self) -> dict[str, DyLoRA]:
        """The adapters that serve every rank, by layer.

        Raises:
            ValueError: if there is none.
        """
        found = {name: one for name, one in adapters(self.model.body).items() if isinstance(one, DyLoRA)}
        if not found:
            raise ValueError(
                "every rank of one model needs a fine-tune that serves them all: adapter=matryoshka or adapter=dylora"
            )
        return found

    def check(self, x: Tensor, y: Tensor | None = None) -> None:
        """Refuse normalised inputs, and targets, that the model was not fine-tuned for.

        Raises:
            ValueError: other channels, another kind of target, another field or a class beyond the model's.
        """
        channels = self.task.input_shape[0]
        if x.shape[1] != channels:
            raise ValueError(f"the inputs have {x.shape[1]} channels, the model was fine-tuned on {channels}")
        if y is not None:
            self.task.check_targets(y)


def load(run_folder: str | Path, tag: str | None = None, trust: Collection[str] = ()) -> Fitted:
    """The model that stage=finetune left in a run folder, ready to predict.

    Args:
        run_folder: runs/<run>, or one runs/<run>/finetune/<tag>. tag: which fine-tune, where there are several.
        trust: `_target_`s outside this package that the fine-tune's predictor or adapter may be, such as
            ["predictor.LastMean"]: loading imports and calls them.

    Raises:
        FileNotFoundError: nothing fine-tuned there. ValueError: several, and no tag to choose by; a
            predictor or adapter that is not trusted. DamagedFile: a file that is not what the stage wrote.
    """
    folder = chosen_folder(Path(run_folder), tag)
    path = folder / "metrics.json"
    metrics = read_json(path, "stage=finetune")
    tensors = read_tensors(folder / "model.safetensors", "stage=finetune")
    with reading(path, f"run `{command('stage=finetune', 'force=true')}`"):
        config, backbone, adapter = metrics["config"], metrics["backbone"], metrics["adapter_module"]
        seed, init, injected = config["seed"], config["embedder"]["init"], config["adapter"]["method"] == "inject"
        # Runs from before predictors could be chosen have ORCA's.
        head = config["predictor"].get("module")
        start, expected = backbone["config"], backbone["hash"]
        task = Task.from_dict(metrics["task"], take_named(tensors, "normaliser"))
        inputs = take_named(tensors, "inputs")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # where the backbone's weights were random, they are drawn again
        predictor = orca if head is None else build_read(head, "predictors", trust, str(path))
        model = create_model(start, task, init, predictor)
    if weights_hash(model.body) != expected:
        raise ValueError(
            f"the backbone's weights are not those that {folder} was fine-tuned from: its config reads {start}"
        )
    if injected:
        plan = read_record(folder / "ranks.json", "stage=finetune", RankPlan.from_dict)
        inject(model.body, plan, adapter=build_read(adapter, "adapters", trust, str(path)))
    result = model.load_state_dict(tensors, strict=False)
    trained = {f"body.{name}" for name in adapter_state_dict(model.body)}
    missing = [name for name in result.missing_keys if name in trained or not name.startswith("body.")]
    if result.unexpected_keys or missing:
        raise ValueError(
            f"{folder / 'model.safetensors'} does not fit its own config: it lacks {missing[:3]} and has beside them "
            f"{result.unexpected_keys[:3]}; run `{command('stage=finetune', 'force=true')}`"
        )
    return Fitted(model, task, metrics, inputs).eval().requires_grad_(False)


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

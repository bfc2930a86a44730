"""stage=predict: what a fine-tuned model makes of the run's test set, or of new data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from torch import Tensor

from orca_rank.artifacts.files import atomic, write_json
from orca_rank.artifacts.lock import locked
from orca_rank.artifacts.provenance import finished, key, plain
from orca_rank.build import targets
from orca_rank.fitted import Fitted, chosen_folder, load
from orca_rank.stages.setup import changes, contents, data_for, stage_folder
from orca_rank.stages.trainer import device_of

console = Console(markup=False)
FAR = 10.0  # deviations of the training inputs: no data of the same kind and unit are so far off as a whole


def run(config: DictConfig) -> None:
    """Write predict/<tag>.npz: the prediction for every test sample of the data that the model was fine-tuned on, or,
    where config.data are others, predict/<tag>-<hash of the data>.npz for every sample of data.train, or of data.test
    where data.train is the file of the fine-tune.

    Beside `prediction`, class scores (n, classes) or (n, classes, H, W), probabilities of labels (n, labels), or
    vectors (n, k) or fields (n, c, H, W) in physical units, without H where inputs are series: `label`, what the best
    class is called, or which labels are given; where the data have targets, `target` and the `metric` of each sample;
    `image`, the files of new images. Inputs are normalised by the statistics of the fine-tune. A .json of the same name
    says what it was made from. The fine-tune is chosen by finetune.tag; where there is only one, it may stay null.

    Raises:
        ValueError: other channels, fields or classes than the model was fine-tuned for, or a file of other options.
            BlockingIOError: another process is at work in the folder.
    """
    tuned = chosen_folder(stage_folder(config, "finetune").parent, config.finetune.tag)
    fitted = load(tuned, trust=targets(config))
    node = plain(config.data)
    made_from = {"data": node, "contents": contents(config, "data"), "finetune": tuned.name}
    new = changes(fitted.metrics["config"], made_from)
    name = str(config.finetune.tag or "prediction")
    if new:
        name += f"-{key({place: made_from[place] for place in ('data', 'contents')})[:6]}"
        tuned_on = fitted.metrics["config"]
        node = new_file(node, tuned_on["data"])
        same = made_from["contents"] and made_from["contents"].get("data") == (tuned_on.get("contents") or {}).get(
            "data"
        )
        if same and node.get("train") == tuned_on["data"].get("train"):
            console.print(
                "warning: these are the files that the model was fine-tuned on, its training samples among them: what "
                "follows is no test error",
                soft_wrap=True,
            )
    path = stage_folder(config, "predict") / f"{name}.npz"
    record = path.with_suffix(".json")
    with locked(path.parent):
        if finished(record, made_from, force=config.force, made_by="stage=predict") and path.exists():
            console.print(f"predict is done: {path} (force=true redoes it)", soft_wrap=True)
            return
        data = data_for(node, fitted, "all" if new else "test")
        batches = data.loader("all") if new else data.test_dataloader()
        arrays = predictions(fitted, batches, device_of(config.trainer))
        if new and hasattr(data, "files"):
            arrays["image"] = np.array(data.files())
        with atomic(path) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # none of them is called allow_pickle
        count, metric = len(arrays["prediction"]), arrays.get("metric")
        found = {} if metric is None else {fitted.task.metric_name: float(metric.mean())}
        said = "no targets" if metric is None else f"{fitted.task.metric_name} {metric.mean():.4f}"
        write_json(
            record,
            {"part": "all" if new else "test", "samples": count, **found},
            config=made_from,
            inputs=[tuned / "model.safetensors"],
        )
    if new:
        console.print(f"new data ({'; '.join(new[:4])}), all of them predicted", soft_wrap=True)
    console.print(f"{said} on {count} samples; {path}", soft_wrap=True)


def new_file(node: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The data config of new data with the file that is predicted as its data.train: data.test, where it is named and
    data.train is still the file that was trained on."""
    if node.get("test") is None or not isinstance(node.get("train"), str | list) or node["train"] != tuned.get("train"):
        return dict(node)
    names = {name: node[f"test_{name}"] for name in ("x", "y") if node.get(f"test_{name}") is not None}
    return {**node, **names, "train": node["test"], "test": None}


@torch.inference_mode()
def predictions(
    fitted: Fitted, batches: Iterable[tuple[Tensor, Tensor | None]], device: torch.device
) -> dict[str, np.ndarray]:
    """Predictions for batches of normalised inputs (B, C, H, W) and targets or None: see `run`."""
    fitted.to(device)
    found: dict[str, list[Tensor]] = {"prediction": [], "target": [], "metric": []}
    size = []
    for x, y in track(batches, "predicting"):
        fitted.check(x, y)
        raw = fitted.model(x.to(device))
        size.append(x.double().square().mean((1, 2, 3)))
        found["prediction"].append(fitted.task.decode(raw).cpu())
        if y is not None:
            found["target"].append(y)
            found["metric"].append(fitted.task.metric(raw, y.to(device)).cpu())
    if fitted.inputs is not None and (far := float(torch.cat(size).median().sqrt())) > FAR:
        console.print(
            f"warning: these inputs lie {far:.3g} deviations of the training inputs from their mean: another unit, "
            f"instrument or channel than the model was fine-tuned on?",
            soft_wrap=True,
        )
    arrays = {name: torch.cat(parts).numpy() for name, parts in found.items() if parts}
    if broken := int((~np.isfinite(arrays["prediction"])).reshape(len(arrays["prediction"]), -1).any(1).sum()):
        console.print(f"warning: {broken} of {len(arrays['prediction'])} predictions are not finite", soft_wrap=True)
    task = fitted.task
    if (chosen := task.chosen(torch.from_numpy(arrays["prediction"]))) is not None:
        named = task.classes is not None and task.kind != "multilabel"
        arrays["label"] = np.array(task.classes)[chosen.numpy()] if named else chosen.numpy()
    if task.series:  # (n, c, 1, L) and (n, 1, L): as files hold series
        arrays |= {name: array.squeeze(-2) for name, array in arrays.items() if array.ndim > 2 and array.shape[-2] == 1}
    return arrays

"""stage=predict: predictions of a fine-tuned model on the test set of the run's data."""

from __future__ import annotations

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from orca_rank.artifacts.files import atomic
from orca_rank.fitted import load
from orca_rank.stages.setup import data_for, stage_folder
from orca_rank.stages.trainer import device_of


def run(config: DictConfig) -> None:
    """Write predict/<tag>.npz: prediction and target of every test sample, and the metric of each.

    The fine-tune is chosen by finetune.tag; where there is only one, it may stay null.
    """
    fitted = load(stage_folder(config, "finetune").parent, config.finetune.tag)
    device = device_of(config.trainer)
    fitted.to(device)
    data = data_for(config.data, fitted.task, "test")
    predictions, targets, metrics = [], [], []
    with torch.inference_mode():
        for x, y in track(data.test_dataloader(), "predicting"):
            raw = fitted.model(x.to(device))
            metrics.append(fitted.task.metric(raw, y.to(device)).cpu())
            predictions.append(fitted.task.decode(raw).cpu())
            targets.append(y)
    metric = torch.cat(metrics).numpy()
    name = config.finetune.tag or "prediction"
    path = stage_folder(config, "predict") / f"{name}.npz"
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, prediction=torch.cat(predictions), target=torch.cat(targets), metric=metric)
    Console().print(f"{fitted.task.metric_name} {metric.mean():.4f} on {len(metric)} samples; {path}", soft_wrap=True)

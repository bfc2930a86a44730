"""What the report needs a model or data for: predictions on test samples, and classical solvers to compare with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from orca_rank.build import check_targets
from orca_rank.data import Data
from orca_rank.data.darcy import Darcy, classical_baseline
from orca_rank.data.module import InMemory
from orca_rank.fitted import load
from orca_rank.measuring.passes import limited
from orca_rank.report.prediction_figures import Gallery, samples
from orca_rank.stages.setup import ready


def test_data(node: Mapping[str, Any], trust: Collection[str], where: str) -> Data:
    """The data of these options, which the file `where` names, ready to test."""
    check_targets(node, "data", trust, where)
    return ready(node, "test")


@torch.inference_mode()
def predictions(run_folder: Path, tag: str, data: Data, trust: Collection[str] = ()) -> Gallery:
    """The first test samples as a fine-tune predicts them, of fields and inputs the first channel."""
    fitted = load(run_folder, tag, trust)
    task = fitted.task
    batches = [(x, y, fitted.model(x)) for x, y in limited(data.test_dataloader(), samples(task.kind))]
    x, y, raw = (torch.cat(parts) for parts in zip(*batches, strict=True))
    shown, label = x, "input, channel 1 (normalised)"
    if isinstance(data, InMemory):
        shown, label = data.parts.test[0][: len(x)], "input, channel 1" if x.shape[1] > 1 else "input"
    if isinstance(data, Darcy):
        label = "coefficient a"
    metric, guess = task.metric(raw, y).tolist(), task.decode(raw)
    if task.kind == "dense":
        y, guess = y[:, 0].float(), guess[:, 0].float()
    elif task.kind == "segmentation":
        y, guess = y.long(), guess.argmax(1)
    return Gallery(shown[:, 0].float().numpy(), y.numpy(), guess.numpy(), metric, label, task.kind)


def baselines(data: Data) -> dict[str, float]:
    """Relative L2 of classical solvers that see what the network sees, for data that have one."""
    if not isinstance(data, Darcy):
        return {}
    values = {"solver on the coarse grid": classical_baseline(data)}
    if data.stride > 1 and data.mode == "fno":
        values["solver on the input repeated to the fine grid"] = classical_baseline(data, True)
    return values

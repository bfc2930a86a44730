"""What a fine-tune leaves of its model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from torch import Tensor, nn

from orca_rank import adapters
from orca_rank.artifacts.files import write_json, write_tensors
from orca_rank.backbone import OrcaModel
from orca_rank.normaliser import named
from orca_rank.ranks import RankPlan
from orca_rank.task import Task
from orca_rank.training.finetune import trained_tensors

console = Console(markup=False)


def scale_in_use(body: nn.Module) -> float | dict[str, float] | None:
    """The scale of the adapters' updates: one number where all layers have it, else the least and the largest; None
    without any."""
    found = sorted(adapters.scales(body).values())
    if not found:
        return None
    return found[0] if math.isclose(found[0], found[-1]) else {"min": found[0], "max": found[-1]}


def write_model(
    folder: Path, model: OrcaModel, plan: RankPlan | None, task: Task, statistics: Mapping[str, Tensor]
) -> None:
    """The plan used, the adapter in PEFT's layout where it has one, and everything that was trained in our own, with
    what outputs and inputs are normalised by."""
    tensors = trained_tensors(model)
    tensors |= {name: value for name, value in model.state_dict().items() if not name.startswith("body.")}
    if plan is not None:
        moved = adapters.moved_ranks(model.body)
        kept = {"ranks_of_the_kept_model": moved} if moved else {}  # beside `ranks`, where it started
        write_json(folder / "ranks.json", {**plan.to_dict(), "scales": adapters.scales(model.body), **kept})
        try:
            adapters.save_peft(model.body, folder / "adapter")
        except adapters.NotExpressible as error:
            console.print(f"no adapter/ in PEFT's layout: {error}")
    tensors |= named({"normaliser": task.normaliser})
    tensors |= {f"inputs.{name}": value for name, value in statistics.items()}
    write_tensors(folder / "model.safetensors", tensors)

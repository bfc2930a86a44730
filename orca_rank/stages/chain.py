"""stage=all: the stages in order, each skipped when it is done."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import Console


def run(config: DictConfig, stages: Sequence[str]) -> None:
    """Run the named stages of one run folder, one after the other."""
    console = Console()
    for position, stage in enumerate(stages, 1):
        console.rule(f"{position}/{len(stages)} {stage}", align="left")
        importlib.import_module(f"orca_rank.stages.{stage}").run(config)
    experiment = f"run={config.run}"
    console.print(
        f"\nnext: another rank at the same budget, and its place in the report:\n"
        f"  python -m orca_rank stage=finetune {experiment} rank=uniform rank.r=4\n"
        f"  python -m orca_rank stage=report {experiment}",
        soft_wrap=True,
    )

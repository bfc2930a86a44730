"""stage=all: the stages in order, each skipped when it is done."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import Console


def run(config: DictConfig, stages: Sequence[str]) -> None:
    """Run the named stages of one run folder, one after the other."""
    console = Console()
    for position, stage in enumerate(stages, 1):
        console.rule(f"{position}/{len(stages)} {stage}", align="left")
        importlib.import_module(f"orca_rank.stages.{stage}").run(config)
    chosen = [option for option in sys.argv[1:] if not option.startswith(("stage=", "rank=", "rank.", "-"))]
    same = shlex.join(["python", "-m", "orca_rank", *chosen])
    console.print(
        f"\nnext: another rule at the same budget, and its place in the report:\n"
        f"  {same} stage=finetune rank=uniform\n"
        f"  {same} stage=report",
        soft_wrap=True,
        markup=False,
    )

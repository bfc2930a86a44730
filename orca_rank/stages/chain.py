"""stage=all: the stages in order, each skipped when it is done."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import Console

from orca_rank.artifacts.command import command
from orca_rank.processes import barrier, first

# The stages that the processes of a run do together; the first process does the others while the rest waits.
TOGETHER = ("align", "finetune")


def run(config: DictConfig, stages: Sequence[str]) -> None:
    """Run the named stages of one run folder, one after the other, once the options of all are checked.

    Raises:
        ValueError: for an option of any of them; whatever the stages raise.
    """
    console = Console(markup=False)
    # All at once, so that a module that cannot be imported says so before the work.
    verbs = [importlib.import_module(f"orca_rank.stages.{stage}") for stage in stages]
    for verb in verbs:  # all options of all stages, before the first writes anything
        verb.check_options(config)
    for position, (stage, verb) in enumerate(zip(stages, verbs, strict=True), 1):
        console.rule(f"{position}/{len(stages)} {stage}", align="left")
        if first() or stage in TOGETHER:
            verb.run(config)
        barrier()  # what one stage wrote the next one reads
    other = "uniform" if "uniform" not in str(config.rank["_target_"]) else "proportional"
    console.print(
        f"\nnext: another rule at the same budget, and its place in the report:\n"
        f"  {command('stage=finetune', f'rank={other}')}\n"
        f"  {command('stage=report')}",
        soft_wrap=True,
    )

"""stage=all: the stages in order, each skipped when it is done."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import Console

from orca_rank.artifacts.command import command, given, other_rule, runs_apart, swept
from orca_rank.processes import barrier, first

# The stages that the processes of a run do together; the first process does the others while the rest waits.
TOGETHER = ("align", "measure", "finetune")
# What the stages before the fine-tunes depend on: a run folder holds one alignment and one measurement.
ONCE = ("seed", "data", "source", "backbone", "embedder", "align", "gap", "measure", "layers.target", "layers.qkv")


def run(config: DictConfig, stages: Sequence[str]) -> None:
    """Run the named stages of one run folder, one after the other, once the options of all are checked.

    Raises:
        ValueError: for an option of any of them, or one that points of a sweep cannot differ in; whatever the stages
            raise.
    """
    check_points(stages)
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
    if swept():  # the next points are the next commands
        return
    other = "uniform" if "uniform" not in str(config.rank["_target_"]) else "proportional"
    chosen = other_rule(other, given(), config.rank.get("r"))
    console.print(
        f"\nnext: another rule at the same budget, and its place in the report:\n"
        f"  {command('stage=finetune', *chosen)}\n"
        f"  {command('stage=report')}",
        soft_wrap=True,
    )


def clashing(points: Sequence[str]) -> list[str]:
    """Those of the swept options (`name=value`) that would align or measure anew in the folder of another point."""
    names = {option: option.lstrip("+").partition("=")[0] for option in points}
    return [option for option, name in names.items() if any(f"{name}.".startswith(f"{one}.") for one in ONCE)]


def check_points(stages: Sequence[str]) -> None:
    """Refuse a sweep whose points would align or measure one folder several times, before the first does.

    Raises:
        ValueError: naming the swept option and both ways out.
    """
    if runs_apart() or not {"align", "measure"} & {*stages} or not (found := clashing(swept())):
        return
    name = found[0].partition("=")[0]
    raise ValueError(
        f"a run folder holds one alignment and one measurement, and the sweep over {name} asks for several: run "
        f"stage=align and stage=measure once and sweep with -m stage=finetune, or give each point a folder with "
        f"run='<name>_${{{name}}}'"
    )

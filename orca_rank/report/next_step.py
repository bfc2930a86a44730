"""What the numbers of a run leave open, and a command that does something about it: one that has not been run."""

from __future__ import annotations

from collections.abc import Sequence

from orca_rank.artifacts.command import left, other_rule, sweep_of
from orca_rank.report.results import Tune
from orca_rank.report.run_folder import RunFolder
from orca_rank.report.tables import Group, apart_from_ranks
from orca_rank.report.tune_sections import ENDS

SEEDS = 3  # fine-tunes that tell how much seeds differ, at least


def next_step(run: RunFolder, group: Group, found: Sequence[Group]) -> tuple[str, str]:
    """What to do next, most important first, and the command for it, with the options of the fine-tune it follows
    from ("" without one).

    Args:
        group: the fine-tunes that are best. found: all of the same metric.
    """
    rule, uniform = group.first.rule, _uniform_beside(group, found)
    others = {one.first.rule for one in found} - {"", "uniform"}
    methods = {str(one.first.option("adapter.method")) for one in found}
    again = "" if left(group.first.folder) else " (give the command the options that it had)"
    if run.stale:
        return "some files were made from others that changed since; make them again, as the notes below say.", ""
    if len(group.tunes) == 1:
        return f"repeat it with other seeds: one says nothing of how much they differ{again}:", more_seeds(run, group)
    if rule == "uniform" and not others:
        return f"compare with ranks that follow what was measured{again}:", _ruled(run, group.first, "proportional")
    if rule not in ("", "uniform") and uniform is None:
        return f"compare with uniform ranks of as many parameters{again}:", _ruled(run, group.first, "uniform")
    if methods <= {*ENDS}:
        return f"train adapters, of far fewer parameters{again}:", _tune(run, group.first, "adapter=lora")
    if not methods & {*ENDS}:
        both = _tune(run, group.first, "adapter=linear_probe,full", "finetune.from=null")
        return f"train the two ends, a frozen and a free body{again}:", sweep_of(both)
    if group.difference is not None and uniform is not None and not decided(group):
        both = " && ".join(more_seeds(run, one) for one in (group, uniform))
        return (
            f"take uniform ranks, which need no measurement, or add seeds until the interval leaves 0 out{again}:",
            both,
        )
    return _use(run, group.first)


def decided(group: Group) -> bool:
    """Whether the interval of the difference to uniform ranks leaves 0 out."""
    if group.difference is None:
        return False
    low, high = group.difference.interval()
    return low > 0 or high < 0


def more_seeds(run: RunFolder, group: Group) -> str:
    """The command for the first seeds that a group does not have."""
    done = {tune.option("seed") for tune in group.tunes}
    count = max(2, SEEDS - len(done))
    seeds = [seed for seed in range(len(done) + count) if seed not in done][:count]
    return sweep_of(_tune(run, group.first, f"seed={','.join(map(str, seeds))}"))


def _ruled(run: RunFolder, tune: Tune, rule: str) -> str:
    """The command for the same with another rule's ranks, of as many parameters where they can be told."""
    given, r = left(tune.folder), tune.options.get("rank.r")
    options = other_rule(rule, given, r if isinstance(r, int) else None)
    if tune.option("adapter.name") == "lora" and tune.options.get("budget.parameters") is None:
        spent = tune.counts.parts["adapter"]
        options = [one for one in options if not one.startswith("budget.")]
        options += ["budget.mean_rank=null", "budget.total_rank=null", f"budget.parameters={spent}"]
    return _tune(run, tune, *options, stage="finetune" if run.measured or rule == "uniform" else "all")


def _use(run: RunFolder, tune: Tune) -> tuple[str, str]:
    """What to do with a fine-tune when its numbers leave nothing open."""
    made = run.path if tune.folder.is_relative_to(run.path) else tune.folder.parent.parent
    chosen = f"finetune.tag={tune.tag}"
    if not (made / "predict" / f"{tune.tag}.npz").exists():
        text = "predict with it the test set, or, with data.train=<your file> beside the rest, new data:"
        return text, run.command("predict", chosen, of=tune.folder)
    if (tune.folder / "adapter").is_dir() and (made / "plan" / "plan.json").exists():
        return "hand its adapter on, with a model card:", run.command("export", chosen, of=tune.folder)
    return "use it: orca_rank.load gives the model in Python.", ""


def _tune(run: RunFolder, tune: Tune, *options: str, stage: str = "finetune") -> str:
    """The command for a further fine-tune with the options of one, in a folder of its own."""
    fresh = [] if tune.option("finetune.tag") == "" else ["finetune.tag=null"]
    wanted = [one for one in options if not (one == "finetune.from=null" and tune.option("finetune.from") == "")]
    return run.command(stage, *fresh, *wanted, of=tune.folder)


def _uniform_beside(group: Group, found: Sequence[Group]) -> Group | None:
    """The group with uniform ranks that differs in nothing but the ranks and has the nearest count of parameters."""
    beside = [one for one in found if one.first.rule == "uniform" and apart_from_ranks(one) == apart_from_ranks(group)]
    return min(beside, key=lambda one: abs(one.parameters - group.parameters), default=None)

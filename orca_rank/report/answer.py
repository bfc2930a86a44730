"""The first lines of the page: what was asked, what came out and how sure it is, what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from orca_rank.report.draw import words
from orca_rank.report.layer_figures import significant
from orca_rank.report.page import cell
from orca_rank.report.results import Interval, Tune
from orca_rank.report.run_folder import RunFolder
from orca_rank.report.sections import (
    backbone_name,
    class_name,
    estimate_text,
    gaps_of,
    interval_text,
    main_metric,
    options_of,
    p_note,
)
from orca_rank.report.tables import Group, groups
from orca_rank.report.tune_sections import ENDS, described, ends, interval_of


class Answer(NamedTuple):
    """A question, its answer with its uncertainty, what to do next, and the command that does it ("" without one)."""

    asked: str
    found: str
    next: str
    command: str = ""


def answer(run: RunFolder, baselines: Mapping[str, float], recommended: list[str]) -> Answer:
    """What the page says first.

    Args:
        baselines: name -> relative L2 error of another method. recommended: what the evidence of this run says to do.
    """
    options = options_of(run)
    target, backbone = class_name(options, "data") or "the target", backbone_name(options) or "the backbone"
    if run.tunes:
        return _of_finetunes(run, baselines, target, backbone)
    if recommended:
        return Answer("Which ranks should adapters get?", recommended[0], "read the claims below.")
    first = run.missing[0] if run.missing else ("", "")
    to_do = f"make {first[0]}:" if first[0] else "nothing is missing."
    if run.measured and run.measured.metrics:
        return Answer(f"How far is {target} from the source at every layer of {backbone}?", _gap(run), to_do, first[1])
    if run.align:
        name, (before, after) = next(iter(run.align.distances.items()), ("", (None, None)))
        change = (
            ""
            if before is None or after is None
            else (
                f"{words(name)} on held-out data went from {estimate_text(before)} to {estimate_text(after)} (90 % intervals)."
            )
        )
        return Answer(f"How near to the source does alignment bring {target}?", change or "It ran.", to_do, first[1])
    counts = run.plan.counts if run.plan else None
    said = (
        ""
        if counts is None
        else f"{counts.trained:,} of {counts.model:,} parameters, {counts.parts['adapter']:,} of them in adapters."
    )
    return Answer("How many parameters does the plan train?", said, to_do, first[1])


def _of_finetunes(run: RunFolder, baselines: Mapping[str, float], target: str, backbone: str) -> Answer:
    best = run.tunes[0]
    own = [tune for tune in run.tunes if tune.metric == best.metric]
    found = groups(own)
    group = next(one for one in found if best in one.tunes)
    rules = [tune.rule for tune in own if tune.rule]
    if len(set(rules)) > 1 and "uniform" in rules:
        others = ", ".join(sorted(set(rules) - {"uniform"}))
        asked = f"Do {others} ranks beat uniform ones when {backbone} is fine-tuned on {target}?"
    else:
        asked = f"How well does {backbone} do on {target} with {best.counts.trained:,} of {best.counts.model:,} parameters trained?"
    other = "solver" if best.metric == "relative_l2" else ""
    lines = ends(found) | ({name: Interval(value) for name, value in baselines.items()} if other else {})
    compared = "; ".join(f"{name} {cell(one.value)}{interval_text(one.low, one.high)}" for name, one in lines.items()
                         if name != described(best))  # fmt: skip
    said = [_result(best, group), _difference(group), f"For comparison: {compared}." if compared else "", _gap(run)]
    return Answer(asked, " ".join(part for part in said if part), *_next(run, group, found))


def _result(best: Tune, group: Group) -> str:
    """The fine-tune that is best on validation, by its test metric and how sure that is."""
    name = described(best)
    metric, test = words(best.metric), interval_of(group.test)
    start = f"{name[0].upper()}{name[1:]} is best on validation, with a test {metric} of"
    if len(group.tunes) == 1:
        return f"{start} {cell(best.test)} (one seed: how much seeds differ is not known)."
    return f"{start} {cell(test.value)}{interval_text(test.low, test.high)} (mean of {len(group.tunes)} seeds, 95 % interval)."


def _difference(group: Group) -> str:
    if group.difference is None:
        return ""
    low, high = group.difference.interval()
    change = (
        f"{abs(group.difference.mean):.2g} % {'less' if group.difference.mean < 0 else 'more'} error than uniform ranks"
    )
    sure = f" [{low:+.2g}, {high:+.2g}]" if math.isfinite(low) else ", from one seed"
    verdict = {True: "", False: ", so seeds alone could make this difference"}[_decided(group)]
    return f"That is {change} with as many parameters{sure}{verdict}."


def _decided(group: Group) -> bool:
    """Whether the interval of the difference to uniform ranks leaves 0 out."""
    low, high = group.difference.interval() if group.difference is not None else (-math.inf, math.inf)
    return low > 0 or high < 0


def _gap(run: RunFolder) -> str:
    if run.measured is None or not run.measured.metrics:
        return ""
    metric = main_metric(run)
    gaps = gaps_of(run.measured, metric)
    count = sum(significant(gap) for gap in gaps.values())
    return f"The {words(metric)} gap to the source has p < 0.05 in {count} of {len(gaps)} layers ({p_note(gaps)})."


def _next(run: RunFolder, group: Group, found: list[Group]) -> tuple[str, str]:
    """What the numbers leave open, most important first, and the command for it."""
    again = " (with the options that it had):"
    if run.stale:
        return "some files were made from others that changed since; make them again, as the notes below say.", ""
    if len(group.tunes) == 1:
        return f"repeat it with other seeds{again}", _sweep(run.command("finetune", "seed=0,1,2"))
    rules = {one.first.rule for one in found}
    if group.first.rule == "uniform" and rules <= {"uniform", ""}:
        return f"compare with ranks that follow what was measured{again}", run.command("finetune", "rank=recommended")
    if group.first.rule not in ("", "uniform") and group.difference is None:
        return f"compare with uniform ranks of as many parameters{again}", run.command("finetune", "rank=uniform")
    methods = {str(one.first.option("adapter.method")) for one in found}
    if not methods & set(ENDS):
        return f"train the two ends, a frozen and a free body{again}", _sweep(
            run.command("finetune", "adapter=linear_probe,full")
        )
    if group.difference is not None and not _decided(group):
        return "take uniform ranks, which need no measurement, or add seeds until the interval leaves 0 out.", ""
    return "use it on new data:", run.command("predict")


def _sweep(command: str) -> str:
    """The command for several values at once; Hydra takes its flags first."""
    start = "python -m orca_rank "
    return command if command.startswith(f"{start}-m ") else command.replace(start, f"{start}-m ", 1)

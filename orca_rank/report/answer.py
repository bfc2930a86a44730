"""The first lines of the page: what was asked, what came out and how sure it is, what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from orca_rank.report.draw import words
from orca_rank.report.layer_figures import significant
from orca_rank.report.next_step import decided, next_step
from orca_rank.report.page import cell
from orca_rank.report.results import Interval, Tune
from orca_rank.report.run_folder import RunFolder
from orca_rank.report.sections import (
    backbone_name,
    class_name,
    main_metric,
    options_of,
)
from orca_rank.report.tables import Group, groups
from orca_rank.report.tune_sections import described, ends, interval_of
from orca_rank.report.values import estimate_text, gaps_of, interval_text, p_note


class Answer(NamedTuple):
    """A question; its answer with its uncertainty, in a sentence; what to compare it with; what to do next, and the
    command that does it ("" without one)."""

    asked: str
    found: str
    beside: str
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
        return Answer(
            "Which ranks should adapters get?", recommended[0], " ".join(recommended[1:]), "read the claims below."
        )
    what, command = run.missing[0] if run.missing else ("", "")
    to_do = f"make {what}:" if what else "nothing is missing."
    if run.measured and run.measured.metrics:
        return Answer(
            f"How far is {target} from the source at every layer of {backbone}?", gap(run), "", to_do, command
        )
    if run.align:
        changes = [
            f"{words(name)} on held-out data went from {estimate_text(before)} to {estimate_text(after)} (90 % "
            f"intervals)."
            for name, (before, after) in run.align.distances.items()
        ] or ["Alignment ran; it compared no held-out data."]
        asked = f"How near to the source does alignment bring {target}?"
        return Answer(asked, changes[0], " ".join(changes[1:]), to_do, command)
    asked = "How many parameters does the plan train?"
    if run.plan is None:
        return Answer(asked, "There is no plan yet.", "", to_do, command)
    counts = run.plan.counts
    found = f"{counts.trained:,} of {counts.model:,}, {counts.parts['adapter']:,} of them in adapters."
    return Answer(asked, found, "", to_do, command)


def _of_finetunes(run: RunFolder, baselines: Mapping[str, float], target: str, backbone: str) -> Answer:
    best = run.tunes[0]
    found = groups([tune for tune in run.tunes if tune.metric == best.metric])
    group = next(one for one in found if best in one.tunes)
    ruled = [one for one in found if one.difference is not None]
    trained = f"{best.counts.trained:,} of {best.counts.model:,} parameters trained"
    asked = f"How well does {backbone} do on {target} with {trained}?"
    said, more = result(best, group), gap(run)
    if ruled:
        compared = group if group in ruled else min(ruled, key=lambda one: min(tune.val for tune in one.tunes))
        asked = f"Do {compared.first.rule} ranks beat uniform ones when {backbone} is fine-tuned on {target}?"
        said, more = difference(compared), f"{said} {more}"
    lines = ends(found)
    if best.metric == "relative_l2":
        lines |= {name: Interval(value) for name, value in baselines.items()}
    others = "; ".join(
        f"{name} {cell(one.value)}{interval_text(one.low, one.high)}"
        for name, one in lines.items()
        if name != described(best)
    )
    beside = f"{more} For comparison: {others}." if others else more
    return Answer(asked, said, beside.strip(), *next_step(run, group, found))


def result(best: Tune, group: Group) -> str:
    """The fine-tune that is best on validation, by its test metric and how sure that is."""
    name = described(best)
    test = interval_of(group.test)
    start = f"{name[0].upper()}{name[1:]} is best on validation, with a test {words(best.metric)} of"
    if len(group.tunes) == 1:
        return f"{start} {cell(best.test)} (one seed: how much seeds differ is not known)."
    mean = f"{cell(test.value)}{interval_text(test.low, test.high)}"
    return f"{start} {mean} (mean of {len(group.tunes)} seeds, 95 % interval)."


def difference(group: Group) -> str:
    """Whether a rule differs from uniform ranks, by how much and how sure that is; of a group that has a difference."""
    assert group.difference is not None
    mean, (low, high) = group.difference.mean, group.difference.interval()
    than = f"{abs(mean):.2g} % {'less' if mean < 0 else 'more'} error than uniform ranks of as many parameters"
    rule = f"{group.first.rule[0].upper()}{group.first.rule[1:]} ranks have {than}"
    if not math.isfinite(low):
        return f"Not known: {rule[0].lower()}{rule[1:]}, but from one seed, and how much seeds differ is not known."
    start = ("Yes: " if mean < 0 else "No: ") if decided(group) else "Undecided: "
    noise = "" if decided(group) else ", so seeds alone could make this difference"
    sure = f"95 % interval {low:+.2g} to {high:+.2g} %, {group.difference.runs} seeds"
    return f"{start}{rule[0].lower()}{rule[1:]} ({sure}){noise}."


def gap(run: RunFolder) -> str:
    """At how many layers the target differs from the source, and by which test."""
    if run.measured is None or not run.measured.metrics:
        return ""
    metric = main_metric(run)
    gaps = gaps_of(run.measured, metric)
    count = sum(significant(one) for one in gaps.values())
    return f"The {words(metric)} gap to the source has p < 0.05 in {count} of {len(gaps)} layers ({p_note(gaps)})."

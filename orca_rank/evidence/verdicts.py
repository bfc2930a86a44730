"""The verdicts: every claim with its figure, its interval and the number of runs behind it.

Differences are per cent of uniform's mean test error on the task, negative where the rule is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from orca_rank.evidence.compare import Estimate, crossed, holm, paired, pooled
from orca_rank.evidence.points import UNIFORM, Row
from orca_rank.evidence.protocol import Protocol

MARGIN = 2.0  # per cent; differences within it are of no use to anybody
LEVEL = 0.05
OWN = ", each rule at its own learning rate"  # in the claim of a rule that was tuned alone
PARAMETERS = "% of the parameters"  # the unit of claims about them


@dataclass(frozen=True)
class Claim:
    """A claim and what the runs say of it.

    Args:
        claim: a sentence. verdict: supported, refuted, equivalent or undecided.
        estimate, low, high: the figure and its 95 % interval, in `unit`. p: of no difference, adjusted by Holm where
            several rules were asked at once. runs: fine-tunes behind it. note: what else a reader must know.
    """

    claim: str
    verdict: str
    estimate: float
    low: float
    high: float
    unit: str
    p: float
    runs: int
    note: str = ""

    def to_dict(self) -> dict[str, str | float | int]:
        return asdict(self)


def judge(estimate: Estimate, p: float, p_outside: float, margin: float = MARGIN) -> str:
    """The verdict on "the difference is below 0".

    equivalent: reliably within ±margin, even where it is reliably not 0; supported: reliably below 0; refuted: reliably
    above 0; undecided: neither.
    """
    if p_outside < LEVEL:
        return "equivalent"
    if p < LEVEL:
        return "supported" if estimate.mean < 0 else "refuted"
    return "undecided"


def rule_differences(
    rows: Sequence[Row], task: str, rank: int, rule: str, against: str = UNIFORM, part: str = "rules"
) -> Estimate | None:
    """The difference of two rules on a task at a budget, paired by seed; None where no seed has both, or
    uniform makes no error.

    Where either has several permutations, both its seeds and its permutations are random (`compare.crossed`). Per cent
    of uniform's error; for arms of the error of the one that they are compared with.
    """
    shared = "arms" if part == "arms" else "rules"
    first, second = (errors_of(rows, task, rank, name, shared if name == against else part) for name in (rule, against))
    seeds = sorted({seed for seed, _ in first} & {seed for seed, _ in second})
    if not seeds:
        return None
    permuted, plain = (first, second) if len({p for _, p in first}) > 1 else (second, first)
    permutations = sorted({p for _, p in permuted})
    complete = [seed for seed in seeds if all((seed, p) in permuted for p in permutations) and (seed, 0) in plain]
    if not complete:
        return None
    unit = second if part == "arms" else errors_of(rows, task, rank, UNIFORM, "rules")
    error = np.mean(list(unit.values()))
    if not error > 0:  # nothing to be relative to
        return None
    scale = 100 / error
    sign = 1.0 if permuted is first else -1.0
    table = np.array([[sign * scale * (permuted[seed, p] - plain[seed, 0]) for p in permutations] for seed in complete])
    return crossed(table) if min(table.shape) > 1 else paired(table.ravel().tolist())


def over_tasks(
    rows: Sequence[Row], tasks: Sequence[str], rank: int, rule: str, against: str = UNIFORM, part: str = "rules"
) -> Estimate | None:
    """`rule_differences` of the tasks that have both sides, pooled with the task as a random effect."""
    found = [rule_differences(rows, task, rank, rule, against, part) for task in tasks]
    known = [estimate for estimate in found if estimate is not None]
    return pooled(known) if known else None


def rules_against_uniform(
    rows: Sequence[Row], tasks: Sequence[str], rank: int, part: str = "rules", against: str = UNIFORM
) -> list[Claim]:
    """One claim a rule: it beats uniform at equal parameters. Holm over the rules, for both kinds of test.

    part="arms" says the same of every arm and the one that it is compared with, `against`.
    """
    names = dict.fromkeys(row.rule for row in rows if row.part == part and row.rank == rank and row.rule != against)
    found = {rule: over_tasks(rows, tasks, rank, rule, against, part) for rule in names}
    known = {rule: estimate for rule, estimate in found.items() if estimate is not None}
    differ = holm({rule: estimate.p for rule, estimate in known.items()})
    outside = holm({rule: estimate.p_outside(MARGIN) for rule, estimate in known.items()})
    own = {"own_rates": OWN, "arms": ", each at its own learning rate"}.get(part, "")
    return [
        _claim(
            f"{rule} beats {against} at the parameters of r = {rank}{own}, {_where(tasks)}",
            estimate,
            differ[rule],
            outside[rule],
            notes(
                _more_or_fewer(rows, tasks, rank, rule, against) if part == "arms" else "",
                cross_entropy(over_tasks(in_cross_entropy(rows), tasks, rank, rule, against, part)),
            ),
        )
        for rule, estimate in known.items()
    ]


def _more_or_fewer(rows: Sequence[Row], tasks: Sequence[str], rank: int, arm: str, against: str) -> str:
    """What an arm trains where that is not, within two per cent, as much as the one that it is compared with."""
    first, second = (
        {row.task: row.parameters for row in rows if (row.part, row.rank, row.rule) == ("arms", rank, name)}
        for name in (arm, against)
    )
    for task in tasks:
        if task in first and task in second and abs(first[task] / second[task] - 1) > 0.02:
            return f"trains {first[task]:,} parameters to {second[task]:,}"
    return ""


def gap_against_shuffled(
    rows: Sequence[Row], tasks: Sequence[str], rank: int, rule: str = "proportional", control: str = "shuffled"
) -> list[Claim]:
    """It matters which layer gets the ranks: ranks in proportion to the gap beat the same ranks dealt out at random."""
    estimate = over_tasks(rows, tasks, rank, rule, control)
    if estimate is None:
        return []
    note = notes(
        f"{control}: seeds and permutations both count as random",
        cross_entropy(over_tasks(in_cross_entropy(rows), tasks, rank, rule, control)),
    )
    text = (
        f"{rule} ranks beat the same ranks shuffled over the layers, at the parameters of r = {rank}, {_where(tasks)}"
    )
    return [_claim(text, estimate, estimate.p, estimate.p_outside(MARGIN), note)]


def parameters_at_equal_error(
    protocol: Protocol, rows: Sequence[Row], tasks: Sequence[str], rank: int, rule: str
) -> list[Claim]:
    """A rule needs fewer parameters than uniform for the same error, in per cent of uniform's.

    The curve of uniform, log error over log rank, is taken as straight through its neighbours r and r′ of the budget;
    a relative difference d of the errors is then worth a factor exp(d / slope) of parameters. The interval is that of d
    alone. Tasks whose curve does not fall there are left out, and said so.
    """
    ranks = sorted(protocol.gate)
    factors, left_out = [], []
    for task in tasks:
        difference = rule_differences(rows, task, rank, rule)
        if difference is None:
            continue
        around = [r for r in ranks if r <= rank][-1:] + [r for r in ranks if r > rank][:1]
        means = [np.mean(list(errors_of(rows, task, r, UNIFORM, "gate").values()) or [np.nan]) for r in around]
        known = len(around) == 2 and min(means) > 0
        slope = np.log(means[1] / means[0]) / np.log(around[1] / around[0]) if known else np.nan
        if not slope < 0:
            left_out.append(task)
            continue
        factors.append(Estimate(difference.mean / -slope, difference.se / -slope, difference.df, difference.runs))
    if not factors:
        return []
    estimate = pooled(factors)
    note = f"from the slope of uniform's rank curve{'; no slope on ' + ', '.join(left_out) if left_out else ''}"
    text = f"{rule} needs fewer parameters than uniform for the error that uniform has at r = {rank}, {_where(tasks)}"
    claim = _claim(text, estimate, estimate.p, 1.0, note)
    shares = [100 * float(np.expm1(value / 100)) for value in (claim.estimate, claim.low, claim.high)]
    return [replace(claim, unit=PARAMETERS, estimate=shares[0], low=shares[1], high=shares[2])]


def errors_of(rows: Sequence[Row], task: str, rank: int, rule: str, part: str) -> dict[tuple[int, int], float]:
    """(seed, permutation) -> test error."""
    return {
        (row.seed, row.permutation): row.test
        for row in rows
        if (row.part, row.task, row.rank, row.rule) == (part, task, rank, rule)
    }


def in_cross_entropy(rows: Sequence[Row]) -> list[Row]:
    """The rows of tasks with classes, their cross-entropy in place of their error."""
    return [replace(row, test=row.cross_entropy) for row in rows if math.isfinite(row.cross_entropy)]


def cross_entropy(estimate: Estimate | None) -> str:
    """What a comparison comes to in cross-entropy, in words, to stand beside a verdict on errors."""
    if estimate is None:
        return ""
    low, high = estimate.interval()
    return f"cross-entropy {estimate.mean:+.1f} %" + (f" [{low:.1f}, {high:.1f}]" if math.isfinite(low) else "")


def notes(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _where(tasks: Sequence[str]) -> str:
    return f"on {tasks[0]}" if len(tasks) == 1 else f"over {len(tasks)} tasks"


def _claim(text: str, estimate: Estimate, p: float, p_outside: float, note: str = "") -> Claim:
    low, high = estimate.interval()
    verdict = judge(estimate, p, p_outside)
    if verdict == "equivalent" and p < LEVEL:
        note = notes("reliably different, by less than is of use", note)
    return Claim(text, verdict, estimate.mean, low, high, "% of the error", p, estimate.runs, note)

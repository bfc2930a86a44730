"""The verdicts: every claim with its figure, its interval and the number of runs behind it.

Differences are per cent of uniform's mean test error on the task, negative where the rule is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from orca_rank.evidence.compare import Estimate, crossed, holm, paired, pooled
from orca_rank.evidence.points import UNIFORM, Row, finite
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
    if min(table.shape) > 1:
        return crossed(table)
    if len(table) == 1:  # many permutations of one seed do not say what seeds do
        return Estimate(float(table.mean()), np.inf, 1, table.size)
    return paired(table.ravel().tolist())


def over_tasks(
    rows: Sequence[Row], tasks: Sequence[str], rank: int, rule: str, against: str = UNIFORM, part: str = "rules"
) -> tuple[list[str], Estimate] | None:
    """`rule_differences` of the tasks that have both sides, which they are, and all together, the task a random effect;
    None where that is none, or one of several."""
    found = {task: rule_differences(rows, task, rank, rule, against, part) for task in tasks}
    known = {task: estimate for task, estimate in found.items() if estimate is not None}
    return (list(known), pooled(list(known.values()))) if len(known) >= min(2, len(tasks)) else None


def rules_against_uniform(
    rows: Sequence[Row], tasks: Sequence[str], rank: int, part: str = "rules", against: str = UNIFORM
) -> list[Claim]:
    """One claim a rule: it beats uniform at equal parameters. Holm over the rules, for both kinds of test.

    part="arms" says the same of every arm and the one that it is compared with, `against`.
    """
    names = dict.fromkeys(row.rule for row in rows if row.part == part and row.rank == rank and row.rule != against)
    found = {rule: over_tasks(rows, tasks, rank, rule, against, part) for rule in names}
    known = {rule: pair for rule, pair in found.items() if pair is not None}
    differ = holm({rule: estimate.p for rule, (_, estimate) in known.items()})
    outside = holm({rule: estimate.p_outside(MARGIN) for rule, (_, estimate) in known.items()})
    own = {"own_rates": OWN, "arms": ", each at its own learning rate"}.get(part, "")
    return [
        _without(
            _claim(
                f"{rule} beats {against} at the parameters of r = {rank}{own}, {_where(used)}",
                estimate,
                differ[rule],
                outside[rule],
                notes(
                    _more_or_fewer(rows, used, rank, rule, against) if part == "arms" else "",
                    in_cross_entropy(rows, used, rank, rule, against, part, estimate.runs),
                ),
            ),
            *(_diverged(rows, used, rank, name, part) for name in (rule, against)),
        )
        for rule, (used, estimate) in known.items()
    ]


def any_of(claims: Sequence[Claim], name: str) -> list[Claim]:
    """Whether any of several beats what all of them are compared with; of claims of `rules_against_uniform`.

    supported: one of them does; refuted: each is worse, or within what is of use; undecided: neither. Figure and p are
    those of the one that is ahead with most certainty, which was chosen for it: no estimate of what it would gain.
    """
    if len(claims) < 2:
        return []
    verdicts = {claim.verdict for claim in claims}
    verdict = "supported" if "supported" in verdicts else "refuted" if verdicts <= {"refuted", "equivalent"} else ""
    first = min(claims, key=lambda claim: (claim.p if claim.estimate < 0 else 2.0, claim.estimate))
    best, _, rest = first.claim.partition(" beats ")
    still = sum(claim.verdict == "undecided" for claim in claims)
    runs = sum(claim.runs for claim in claims)
    note = notes(f"the first of {len(claims)} is {best}", f"{still} of them undecided" if still else "")
    return [replace(first, claim=f"any {name} beats {rest}", verdict=verdict or "undecided", runs=runs, note=note)]


def _more_or_fewer(rows: Sequence[Row], tasks: Sequence[str], rank: int, arm: str, against: str) -> str:
    """What an arm trains where that is not, within two per cent, as much as the one that it is compared with."""
    first, second = (
        {row.task: row.parameters for row in rows if (row.part, row.rank, row.rule) == ("arms", rank, name)}
        for name in (arm, against)
    )
    for task in tasks:
        if first.get(task) and second.get(task) and abs(first[task] / second[task] - 1) > 0.02:
            return f"trains {first[task]:,} parameters to {second[task]:,}"
    return ""


def gap_against_shuffled(
    rows: Sequence[Row], tasks: Sequence[str], rank: int, rule: str = "proportional", control: str = "shuffled"
) -> list[Claim]:
    """It matters which layer gets the ranks: ranks in proportion to the gap beat the same ranks dealt out at random."""
    found = over_tasks(rows, tasks, rank, rule, control)
    if found is None:
        return []
    used, estimate = found
    note = notes(
        f"{control}: seeds and permutations both count as random",
        in_cross_entropy(rows, used, rank, rule, control, "rules", estimate.runs),
    )
    text = f"{rule} ranks beat the same ranks shuffled over the layers, at the parameters of r = {rank}, {_where(used)}"
    claim = _claim(text, estimate, estimate.p, estimate.p_outside(MARGIN), note)
    return [_without(claim, *(_diverged(rows, used, rank, name, "rules") for name in (rule, control)))]


def parameters_at_equal_error(
    protocol: Protocol, rows: Sequence[Row], tasks: Sequence[str], rank: int, rule: str
) -> list[Claim]:
    """A rule needs fewer parameters than uniform for the same error, in per cent of uniform's.

    The curve of uniform, log error over log rank, is taken as straight through its neighbours r and r′ of the budget;
    a relative difference d of the errors is then worth a factor exp(d / slope) of parameters. The interval is that of d
    alone. Tasks whose curve does not fall there are left out, and said so.
    """
    ranks = sorted(protocol.gate)
    factors, used, left_out = [], [], []
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
        used.append(task)
        factors.append(Estimate(difference.mean / -slope, difference.se / -slope, difference.df, difference.runs))
    if not factors:
        return []
    estimate = pooled(factors)
    note = f"from the slope of uniform's rank curve{'; no slope on ' + ', '.join(left_out) if left_out else ''}"
    text = f"{rule} needs fewer parameters than uniform for the error that uniform has at r = {rank}, {_where(used)}"
    claim = _claim(text, estimate, estimate.p, 1.0, note)
    shares = [100 * float(np.expm1(value / 100)) for value in (claim.estimate, claim.low, claim.high)]
    return [replace(claim, unit=PARAMETERS, estimate=shares[0], low=shares[1], high=shares[2])]


def errors_of(rows: Sequence[Row], task: str, rank: int, rule: str, part: str) -> dict[tuple[int, int], float]:
    """(seed, permutation) -> test error, of the runs that did not diverge."""
    return {(row.seed, row.permutation): row.test for row in finite(rows, part, task, rule, rank)}


def _diverged(rows: Sequence[Row], tasks: Sequence[str], rank: int, rule: str, part: str) -> tuple[str, int, int]:
    """(rule, how many of its runs diverged, how many it has)."""
    parts = {part, "rules"} if part == "own_rates" else {part}
    mine = [row for row in rows if row.part in parts and (row.rank, row.rule) == (rank, rule) and row.task in tasks]
    return rule, sum(row.diverged for row in mine), len(mine)


def _without(claim: Claim, rule: tuple[str, int, int], against: tuple[str, int, int]) -> Claim:
    """A claim that says which runs diverged and are left out: the side that they belong to is not called as good or
    better for those that did not."""
    if not rule[1] and not against[1]:
        return claim
    said = (f"diverged: {count} of {of} runs of {name}" for name, count, of in (rule, against) if count)
    unsafe = ({"supported", "equivalent"} if rule[1] else set()) | ({"refuted", "equivalent"} if against[1] else set())
    verdict = "undecided" if claim.verdict in unsafe else claim.verdict
    return replace(claim, verdict=verdict, note=notes(*said, claim.note))


def cross_entropies(rows: Sequence[Row]) -> list[Row]:
    """The rows of tasks with classes, their cross-entropy in place of their error."""
    return [replace(row, test=row.cross_entropy) for row in rows if not math.isnan(row.cross_entropy)]


def in_cross_entropy(
    rows: Sequence[Row], tasks: Sequence[str], rank: int, rule: str, against: str, part: str, runs: int
) -> str:
    """What a comparison comes to in cross-entropy, in words, to stand beside a verdict on errors of so many runs: of
    which tasks and of how many runs, where not of all."""
    losses = cross_entropies(rows)
    having = [task for task in tasks if any(row.task == task for row in losses)]
    found = over_tasks(losses, having, rank, rule, against, part) if having else None
    if found is None:
        return ""
    used, estimate = found
    where = "" if used == list(tasks) else f" on {', '.join(used)}"
    return f"cross-entropy{where}{'' if estimate.runs == runs else f' ({estimate.runs} runs)'} {change(estimate)}"


def change(estimate: Estimate) -> str:
    """A difference in per cent, with its interval where that is known."""
    low, high = estimate.interval()
    return f"{estimate.mean:+.1f} %" + (f" [{low:.1f}, {high:.1f}]" if math.isfinite(low) else "")


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

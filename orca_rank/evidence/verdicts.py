"""The verdicts: every claim with its figure, its interval and the number of runs behind it.

Differences are per cent of uniform's mean test error on the task, negative where the rule is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import stats

from orca_rank.evidence.compare import Estimate, crossed, holm, paired, pooled
from orca_rank.evidence.points import FROZEN, FULL, UNIFORM, Row
from orca_rank.evidence.protocol import Protocol, rank_matters

MARGIN = 2.0  # per cent; differences within it are of no use to anybody
LEVEL = 0.05


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
    first, second = (_errors(rows, task, rank, name, shared if name == against else part) for name in (rule, against))
    seeds = sorted({seed for seed, _ in first} & {seed for seed, _ in second})
    if not seeds:
        return None
    permuted, plain = (first, second) if len({p for _, p in first}) > 1 else (second, first)
    permutations = sorted({p for _, p in permuted})
    complete = [seed for seed in seeds if all((seed, p) in permuted for p in permutations) and (seed, 0) in plain]
    if not complete:
        return None
    unit = second if part == "arms" else _errors(rows, task, rank, UNIFORM, "rules")
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
    own = {"own_rates": ", each rule at its own learning rate", "arms": ", each at its own learning rate"}.get(part, "")
    return [
        _claim(
            f"{rule} beats {against} at the parameters of r = {rank}{own}, {_where(tasks)}",
            estimate,
            differ[rule],
            outside[rule],
        )
        for rule, estimate in known.items()
    ]


def gap_against_shuffled(
    rows: Sequence[Row], tasks: Sequence[str], rank: int, rule: str = "proportional", control: str = "shuffled"
) -> list[Claim]:
    """It matters which layer gets the ranks: ranks in proportion to the gap beat the same ranks dealt out at random."""
    estimate = over_tasks(rows, tasks, rank, rule, control)
    if estimate is None:
        return []
    note = f"{control}: seeds and permutations both count as random"
    text = (
        f"{rule} ranks beat the same ranks shuffled over the layers, at the parameters of r = {rank}, {_where(tasks)}"
    )
    return [_claim(text, estimate, estimate.p, estimate.p_outside(MARGIN), note)]


def ranks_matter(protocol: Protocol, rows: Sequence[Row]) -> list[Claim]:
    """The gate of every task that has one: rank changes the error by more than the seeds do."""
    if not protocol.gate:
        return []
    claims = []
    low, high = min(protocol.gate), max(protocol.gate)
    for task in protocol.tasks:
        errors = {rank: _errors(rows, task, rank, UNIFORM, "gate") for rank in (low, high)}
        seeds = sorted(set(errors[low]) & set(errors[high]))
        mean = float(np.mean(list(errors[low].values()) or [0.0]))
        if len(seeds) < 2 or not mean > 0:
            continue
        gate = rank_matters(protocol, rows, task)
        scale = 100 / mean
        estimate = paired([scale * (errors[high][seed] - errors[low][seed]) for seed in seeds])
        below, above = estimate.interval()
        claims.append(
            Claim(
                f"rank matters on {task}: r = {high} against r = {low}",
                "supported" if gate.matters else "undecided",
                estimate.mean,
                below,
                above,
                "% of the error",
                estimate.p,
                estimate.runs * 2,
                f"asked for more than 3 standard deviations of a seed ({300 * gate.spread / gate.low:.1f} %)",
            )
        )
    return claims


def rank_grows_with_gap(protocol: Protocol, rows: Sequence[Row], gaps: Mapping[str, float]) -> list[Claim]:
    """The larger the gap of a task, the larger the uniform rank that is best on it.

    Kendall's τ over tasks between the gap and the rank of the lowest mean test error on the curve, with its exact
    one-sided permutation p-value: with fewer than 4 tasks it cannot fall below 0.05.

    Args:
        gaps: task -> median calibrated gap over its layers.
    """
    best: dict[str, int] = {}
    runs = 0
    for task in protocol.tasks if protocol.gate else ():
        means = {}
        for rank in protocol.gate:
            errors = list(_errors(rows, task, rank, UNIFORM, "gate").values())
            runs += len(errors)
            if errors:
                means[rank] = float(np.mean(errors))
        if task in gaps and len(means) == len(protocol.gate):
            best[task] = min(means, key=lambda rank: means[rank])
    if len(best) < 2:
        return []
    x, y = [gaps[task] for task in best], [best[task] for task in best]
    note = ", ".join(f"{task}: gap {gaps[task]:.3g}, r = {rank}" for task, rank in best.items())
    if len(set(y)) == 1:
        note = f"the same rank is best on every task; {note}"
        return [Claim(GROWS, "undecided", float("nan"), float("nan"), float("nan"), "Kendall's τ", 1.0, runs, note)]
    tau = float(stats.kendalltau(x, y).statistic)
    draws = np.array([stats.kendalltau(x, order).statistic for order in _orders(y)])
    up, down = float((draws >= tau - 1e-12).mean()), float((draws <= tau + 1e-12).mean())
    verdict = "supported" if up < LEVEL else "refuted" if down < LEVEL else "undecided"
    return [Claim(GROWS, verdict, tau, float("nan"), float("nan"), "Kendall's τ", up, runs, note)]


PARAMETERS = "% of the parameters"  # the unit of claims about them
GROWS = "the best uniform rank grows with the gap of the task"


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
        means = [np.mean(list(_errors(rows, task, r, UNIFORM, "gate").values()) or [np.nan]) for r in around]
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
    return [replace(claim, unit=PARAMETERS)]


def recommended(protocol: Protocol, rows: Sequence[Row], task: str) -> str:
    """The gate's answer for a user: does rank matter here, which rank, at which rate, and what it costs.

    Raises:
        ValueError: if the rank curve of the task is not there.
    """
    gate = rank_matters(protocol, rows, task)
    means: dict[int, float] = {}
    for rank in sorted(protocol.gate):
        errors = list(_errors(rows, task, rank, UNIFORM, "gate").values())
        if errors:
            means[rank] = float(np.mean(errors))
    rank = min(means)
    if gate.matters:
        # The smallest rank that is no more than a seed's standard deviation above the best.
        rank = min(r for r, mean in means.items() if mean <= min(means.values()) + gate.spread)
    row = next(row for row in rows if (row.part, row.task, row.rule, row.rank) == ("gate", task, UNIFORM, rank))
    others = [
        f"{name} {np.mean(found):.4g}"
        for name, found in (
            ("frozen body", list(_errors(rows, task, 0, FROZEN, "gate").values())),
            ("full fine-tuning", list(_errors(rows, task, 0, FULL, "gate").values())),
        )
        if found
    ]
    curve = ", ".join(f"r = {r}: {mean:.4g}" for r, mean in means.items())
    answer = "rank matters" if gate.matters else "rank hardly matters"
    return (
        f"{task}: {answer} ({curve}; {', '.join(others)}; a seed's standard deviation {gate.spread:.2g}). "
        f"Use rank=uniform rank.r={rank} finetune.optimizer.lr={row.lr:g} finetune.predictor_lr={row.predictor_lr:g}: "
        f"{row.parameters:,} trained parameters, {row.seconds:.0f} s a run here."
    )


def _errors(rows: Sequence[Row], task: str, rank: int, rule: str, part: str) -> dict[tuple[int, int], float]:
    """(seed, permutation) -> test error."""
    return {
        (row.seed, row.permutation): row.test
        for row in rows
        if (row.part, row.task, row.rank, row.rule) == (part, task, rank, rule)
    }


def _where(tasks: Sequence[str]) -> str:
    return f"on {tasks[0]}" if len(tasks) == 1 else f"over {len(tasks)} tasks"


def _claim(text: str, estimate: Estimate, p: float, p_outside: float, note: str = "") -> Claim:
    low, high = estimate.interval()
    verdict = judge(estimate, p, p_outside)
    if verdict == "equivalent" and p < LEVEL:
        note = "; ".join(part for part in ("reliably different, by less than is of use", note) if part)
    return Claim(text, verdict, estimate.mean, low, high, "% of the error", p, estimate.runs, note)


def _orders(values: Sequence[int], most: int = 7) -> list[list[int]]:
    """Every order of a few values, 5,000 random ones of more."""
    from itertools import permutations

    if len(values) <= most:
        return [list(order) for order in permutations(values)]
    draw = np.random.default_rng(0)
    return [list(draw.permutation(values)) for _ in range(5000)]

"""What the rank curves say: whether rank matters on a task, whether it matters more where the gap is larger, and which
rank to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from orca_rank.evidence.compare import Estimate, paired
from orca_rank.evidence.points import FROZEN, FULL, UNIFORM, Row
from orca_rank.evidence.protocol import Protocol, rank_matters
from orca_rank.evidence.verdicts import LEVEL, Claim, cross_entropy, errors_of, in_cross_entropy, notes

GROWS = "the best uniform rank grows with the gap of the task"


def ranks_matter(protocol: Protocol, rows: Sequence[Row]) -> list[Claim]:
    """The gate of every task that has one: rank changes the error by more than the seeds do."""
    if not protocol.gate:
        return []
    claims = []
    low, high = min(protocol.gate), max(protocol.gate)
    for task in protocol.tasks:
        errors = {rank: errors_of(rows, task, rank, UNIFORM, "gate") for rank in (low, high)}
        seeds = sorted(set(errors[low]) & set(errors[high]))
        mean = float(np.mean(list(errors[low].values()) or [0.0]))
        if len(seeds) < 2 or not mean > 0:
            continue
        gate = rank_matters(protocol, rows, task)
        estimate = _of_rank(errors[low], errors[high])
        losses = {rank: errors_of(in_cross_entropy(rows), task, rank, UNIFORM, "gate") for rank in (low, high)}
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
                notes(
                    f"asked for more than 3 standard deviations of a seed ({300 * gate.spread / gate.low:.1f} %)",
                    cross_entropy(_of_rank(losses[low], losses[high]) if losses[low].keys() & losses[high] else None),
                ),
            )
        )
    return claims


def _of_rank(low: Mapping[tuple[int, int], float], high: Mapping[tuple[int, int], float]) -> Estimate:
    """What the larger rank adds, in per cent of the smaller one's mean, paired by seed."""
    mean = float(np.mean(list(low.values())))
    return paired([100 / mean * (high[seed] - low[seed]) for seed in sorted(low.keys() & high.keys())])


def grows_with_gap(protocol: Protocol, rows: Sequence[Row], gaps: Mapping[str, float]) -> list[Claim]:
    """The larger the gap of a task, the larger the uniform rank that is best on it; and the more is rank worth on it.

    Kendall's τ over tasks between the gap and, first, the rank of the lowest mean test error on the curve, second, the
    share of the error that the largest rank takes off the smallest one's; each with its exact one-sided permutation
    p-value: with fewer than 4 tasks it cannot fall below 0.05.

    Args:
        gaps: task -> median calibrated gap over its layers.
    """
    best: dict[str, float] = {}
    worth: dict[str, float] = {}
    runs = 0
    for task in protocol.tasks if protocol.gate else ():
        errors = {rank: list(errors_of(rows, task, rank, UNIFORM, "gate").values()) for rank in protocol.gate}
        runs += sum(map(len, errors.values()))
        if task in gaps and all(errors.values()):
            means = {rank: float(np.mean(found)) for rank, found in errors.items()}
            best[task] = min(means, key=lambda rank: means[rank])
            worth[task] = 100 * (1 - means[max(means)] / means[min(means)])
    if len(best) < 2:
        return []
    ends = f"what rank is worth (r = {max(protocol.gate)} against {min(protocol.gate)}) grows with the gap of the task"
    return [
        _rising(GROWS, gaps, best, "r = {:g}", runs),
        _rising(ends, gaps, worth, "{:.1f} % of the error", runs),
    ]


def _rising(claim: str, gaps: Mapping[str, float], found: Mapping[str, float], form: str, runs: int) -> Claim:
    x, y = [gaps[task] for task in found], [found[task] for task in found]
    note = ", ".join(f"{task}: gap {gaps[task]:.3g}, {form.format(value)}" for task, value in found.items())
    if len(set(y)) == 1:
        note = f"the same on every task; {note}"
        return Claim(claim, "undecided", float("nan"), float("nan"), float("nan"), "Kendall's τ", 1.0, runs, note)
    tau = float(stats.kendalltau(x, y).statistic)
    draws = np.array([stats.kendalltau(x, order).statistic for order in _orders(y)])
    up, down = float((draws >= tau - 1e-12).mean()), float((draws <= tau + 1e-12).mean())
    verdict = "supported" if up < LEVEL else "refuted" if down < LEVEL else "undecided"
    return Claim(claim, verdict, tau, float("nan"), float("nan"), "Kendall's τ", up, runs, note)


def recommended(protocol: Protocol, rows: Sequence[Row], task: str) -> str:
    """The gate's answer for a user: does rank matter here, which rank, at which rate, and what it costs.

    Raises:
        ValueError: if the rank curve of the task is not there.
    """
    gate = rank_matters(protocol, rows, task)
    means: dict[int, float] = {}
    for rank in sorted(protocol.gate):
        errors = list(errors_of(rows, task, rank, UNIFORM, "gate").values())
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
            ("frozen body", list(errors_of(rows, task, 0, FROZEN, "gate").values())),
            ("full fine-tuning", list(errors_of(rows, task, 0, FULL, "gate").values())),
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


def _orders(values: Sequence[float], most: int = 7) -> list[list[float]]:
    """Every order of a few values, 5,000 random ones of more."""
    from itertools import permutations

    if len(values) <= most:
        return [list(order) for order in permutations(values)]
    draw = np.random.default_rng(0)
    return [list(draw.permutation(values)) for _ in range(5000)]

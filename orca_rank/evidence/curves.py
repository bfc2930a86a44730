"""What the rank curves say: whether rank matters on a task, whether it matters more where the gap is larger, and which
rank to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from orca_rank.evidence.compare import Estimate, paired
from orca_rank.evidence.points import FROZEN, FULL, UNIFORM, Row, finite
from orca_rank.evidence.protocol import Protocol, rank_matters
from orca_rank.evidence.verdicts import LEVEL, Claim, change, cross_entropies, errors_of, notes

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
        if len(seeds) < 2 or not (gate := rank_matters(protocol, rows, task)).low > 0:
            continue
        estimate = _of_rank(errors[low], errors[high])
        losses = [errors_of(cross_entropies(rows), task, rank, UNIFORM, "gate") for rank in (low, high)]
        shared = losses[0].keys() & losses[1].keys()
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
                    f"asked for more than 3 standard deviations of a run, of their differences over √2 "
                    f"({300 * gate.spread / gate.low:.1f} %)",
                    f"cross-entropy {change(_of_rank(*losses))}" if shared else "",
                    *_fewer(protocol, rows, task, (low, high)),
                ),
            )
        )
    return claims


def _of_rank(low: Mapping[tuple[int, int], float], high: Mapping[tuple[int, int], float]) -> Estimate:
    """What the larger rank adds, in per cent of the smaller one's mean, paired by seed."""
    seeds = sorted(low.keys() & high.keys())
    mean = float(np.mean([low[seed] for seed in seeds]))
    return paired([100 / mean * (high[seed] - low[seed]) for seed in seeds])


def _fewer(protocol: Protocol, rows: Sequence[Row], task: str, ranks: Sequence[int]) -> list[str]:
    curve = [row for row in rows if (row.part, row.task, row.rule) == ("gate", task, UNIFORM) and row.diverged]
    counts = {rank: sum(row.rank == rank for row in curve) for rank in ranks}
    return [f"{count} of {protocol.gate_seeds} runs of r = {rank} diverged" for rank, count in counts.items() if count]


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
            if not means[min(means)] > 0:  # nothing to be relative to
                continue
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
    if len(set(y)) == 1 or len(set(x)) == 1:
        note = f"{'the same' if len(set(y)) == 1 else 'one gap'} on every task; {note}"
        return Claim(claim, "undecided", float("nan"), float("nan"), float("nan"), "Kendall's τ", 1.0, runs, note)
    tau = float(stats.kendalltau(x, y).statistic)
    draws = np.array([stats.kendalltau(x, order).statistic for order in _orders(y)])
    up, down = float((draws >= tau - 1e-12).mean()), float((draws <= tau + 1e-12).mean())
    verdict = "supported" if up < LEVEL else "refuted" if down < LEVEL else "undecided"
    return Claim(claim, verdict, tau, float("nan"), float("nan"), "Kendall's τ", up, runs, note)


def recommended(protocol: Protocol, rows: Sequence[Row], task: str) -> str:
    """The gate's answer for a user: does rank matter here, which rank, at which rates, and what it costs.

    Where it matters, the smallest rank whose mean validation error is no more than a standard deviation of a run above
    the best; else the smallest of the curve.

    Raises:
        ValueError: if the rank curve of the task is not there.
    """
    gate, judged = rank_matters(protocol, rows, task), rank_matters(protocol, rows, task, "val")
    curve = {rank: finite(rows, "gate", task, UNIFORM, rank) for rank in sorted(protocol.gate)}
    curve = {rank: found for rank, found in curve.items() if found}
    rank = min(curve)
    if gate.matters:
        means = {r: float(np.mean([row.val for row in found])) for r, found in curve.items()}
        rank = min(r for r, mean in means.items() if mean <= min(means.values()) + judged.spread)
    row = curve[rank][0]
    others = (("frozen body", FROZEN), ("full fine-tuning", FULL))
    known = [(f"r = {r}", found) for r, found in curve.items()]
    known += [(name, found) for name, rule in others if (found := finite(rows, "gate", task, rule, 0))]
    errors = ", ".join(f"{name}: {np.mean([row.test for row in found]):.4g}" for name, found in known)
    answer = "rank matters" if gate.matters else "whether rank matters cannot be told, so the smallest will do"
    return (
        f"{task}: {answer} (test error at {errors}; a run's standard deviation {gate.spread:.2g}). "
        f"Use rank=uniform rank.r={rank} finetune.optimizer.lr={row.lr:g} finetune.predictor_lr={row.predictor_lr:g} "
        f"finetune.embedder_lr={row.predictor_lr:g}: {row.parameters:,} trained parameters, {row.seconds:.0f} s a run "
        f"where it ran. The embedder was not aligned (embedder.aligned=false)."
    )


def _orders(values: Sequence[float], most: int = 7) -> list[list[float]]:
    """Every order of a few values, 5,000 random ones of more."""
    from itertools import permutations

    if len(values) <= most:
        return [list(order) for order in permutations(values)]
    draw = np.random.default_rng(0)
    return [list(draw.permutation(values)) for _ in range(5000)]

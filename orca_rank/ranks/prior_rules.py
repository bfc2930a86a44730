"""Rank rules from the priors of `ibp`: α_i = a D_i^γ / mean(D^γ), one statistic of the prior as the rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from orca_rank.measuring.records import LayerLike, as_layers
from orca_rank.ranks.allocate import power, share_along
from orca_rank.ranks.ibp import beta_bernoulli_law, concentration, poisson_law, stick_law
from orca_rank.ranks.plan import Budget, RankPlan
from orca_rank.ranks.rules import gap_values, need_budget

STATISTICS = ("mean", "mode", "quantile", "sample")
Law = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Options:
    """What the three priors are asked for; see `ibp_count`.

    Raises:
        ValueError: for an unknown statistic or a quantile outside (0, 1).
    """

    a: float | None
    gamma: float
    metric: str
    statistic: str
    quantile: float
    seed: int

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {self.statistic!r}")
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must lie between 0 and 1, got {self.quantile}")


def ibp_count(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    a: float | None = None,
    gamma: float = 1.0,
    metric: str = "mmd",
    statistic: str = "mean",
    quantile: float = 0.9,
    seed: int = 0,
) -> RankPlan:
    """r_i ~ Poisson(α_i) truncated to [r_min, r_max]: the number of dishes one customer of an IBP takes.

    Args:
        a: mean prior rank. By default the largest that the budget affords, and the budget is spent to the last unit.
            If given, the ranks are what the prior says; a budget may be None, and is otherwise a limit.
        gamma, metric: α_i = a D_i^γ / mean(D^γ), D_i the calibrated gap, negative ones as 0.
        statistic: `mean` (rounded by largest remainder), `mode`, `quantile`, or `sample` (one draw from `seed`).

    Raises:
        ValueError: for a bad option, or an `a` whose ranks exceed the budget.
    """
    options = Options(a, gamma, metric, statistic, quantile, seed)
    return _from_prior("ibp_count", poisson_law, layers, budget, options)


def ibp_stick(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    a: float | None = None,
    gamma: float = 1.0,
    metric: str = "mmd",
    statistic: str = "mean",
    quantile: float = 0.9,
    seed: int = 0,
) -> RankPlan:
    """P(r_i >= k) = (α_i/(1+α_i))^k, the nested stick-breaking prior; arguments and errors as in `ibp_count`, but
    `statistic="mode"` is refused: this law is largest at r_min whatever the gap."""
    if statistic == "mode":
        raise ValueError("the mode of ibp_stick is r_min for every gap: take statistic=mean, quantile or sample")
    options = Options(a, gamma, metric, statistic, quantile, seed)
    return _from_prior("ibp_stick", stick_law, layers, budget, options)


def beta_bernoulli(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    a: float | None = None,
    gamma: float = 1.0,
    metric: str = "mmd",
    statistic: str = "mean",
    quantile: float = 0.9,
    seed: int = 0,
    features: int | None = None,
) -> RankPlan:
    """r_i ~ Binomial(K, α_i/(K + α_i)), the finite beta-Bernoulli prior with K = `features` (by default the highest
    rank allowed in the layer), which no rank exceeds; other arguments and errors as in `ibp_count`."""
    options = Options(a, gamma, metric, statistic, quantile, seed)
    if features is not None and features < max(1, 0 if budget is None else budget.r_min):
        raise ValueError(f"features is the highest rank: it must be at least 1 and budget.r_min, got {features}")

    def law(alpha: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return beta_bernoulli_law(alpha, low, high, None if features is None else np.full_like(high, features))

    plan = _from_prior("beta_bernoulli", law, layers, budget, options, features)
    return RankPlan(plan.ranks, plan.rule, plan.budget, {**plan.options, "features": features})


def _from_prior(
    rule: str,
    law: Law,
    layers: Sequence[LayerLike],
    budget: Budget | None,
    options: Options,
    r_max: int | None = None,
) -> RankPlan:
    records = as_layers(layers)
    limit = need_budget(budget, rule, "or give rank.a") if options.a is None else budget
    if limit is not None and r_max is not None:
        limit = replace(limit, r_max=r_max if limit.r_max is None else min(r_max, limit.r_max))
    gaps = gap_values(records, options.metric, rule)
    unit = concentration(gaps, 1.0 if options.a is None else options.a, options.gamma)
    if limit is None:
        low = np.zeros(len(records), dtype=int)
        high = np.array([min(layer.full_rank, r_max or layer.full_rank) for layer in records])
    else:
        low, high = (np.array(bound) for bound in limit.bounds(records))
    uniforms = np.random.default_rng(options.seed).random(len(records))

    def means(level: float) -> np.ndarray:
        probability = law(level * unit, low, high)
        return probability @ np.arange(probability.shape[1])

    def ranks(level: float) -> np.ndarray:
        if options.statistic == "mean":
            return np.floor(means(level) + 1e-9).astype(int)
        probability = law(level * unit, low, high)
        if options.statistic == "mode":
            return probability.argmax(axis=1)
        target = np.full(len(records), float(options.quantile)) if options.statistic == "quantile" else uniforms
        below = np.cumsum(probability, axis=1) < target[:, None] - 1e-12
        return np.minimum(below.sum(axis=1), high)

    if options.a is None:
        level, named = share_along(records, need_budget(limit, rule), power(gaps, options.gamma), means, ranks)
        return RankPlan(named, rule, budget, asdict(replace(options, a=level)))
    chosen = _largest_remainder(means(1.0)) if options.statistic == "mean" else ranks(1.0)
    named = {layer.name: int(r) for layer, r in zip(records, chosen, strict=True)}
    plan = RankPlan(named, rule, budget, asdict(options))
    return _within_budget(plan, records)


def _within_budget(plan: RankPlan, records: Sequence[LayerLike]) -> RankPlan:
    budget = plan.budget
    if budget is not None and (used := budget.used(plan, records)) > (allowed := budget.allowed(records)):
        raise ValueError(
            f"{plan.rule} with a={plan.options['a']} asks for {used} "
            f"{'ranks' if budget.parameters is None else 'parameters'}, the budget allows {allowed}: lower rank.a, "
            "raise the budget, set its limit to null, or leave rank.a null for the largest that the budget affords"
        )
    return plan


def _largest_remainder(quotas: np.ndarray) -> np.ndarray:
    """Integers of the same (rounded) sum: all rounded down, then one more for the largest remainders."""
    ranks = np.floor(quotas + 1e-9).astype(int)
    left = int(np.rint(quotas.sum())) - int(ranks.sum())
    order = np.argsort(-np.round(quotas - ranks, 9), kind="stable")  # of equals the earlier first
    ranks[order[: max(left, 0)]] += 1
    return ranks

"""Rank rules from the priors of `ibp`: α_i = a D_i^γ / mean(D^γ), one statistic of the prior as the rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from orca_rank.ranks.allocate import share_along
from orca_rank.ranks.ibp import beta_bernoulli_law, concentration, poisson_law, stick_law
from orca_rank.ranks.plan import Budget, LayerLike, RankPlan, as_layers
from orca_rank.ranks.rules import gap_values, need_budget, power

STATISTICS = ("mean", "mode", "quantile", "sample")
Law = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def ibp_count(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    a: float | int | None = None,
    gamma: float | int = 1.0,
    metric: str = "mmd",
    statistic: str = "mean",
    quantile: float | int = 0.9,
    seed: int = 0,
) -> RankPlan:
    """r_i ~ Poisson(α_i) truncated to [r_min, r_max]: the number of dishes one customer of an IBP takes.

    Args:
        a: mean prior rank. By default the largest that the budget affords, and the budget is spent to the last unit;
            if given, the budget only bounds r_min and r_max and may be None.
        gamma, metric: α_i = a D_i^γ / mean(D^γ), D_i the calibrated gap, negative ones as 0.
        statistic: `mean` (rounded by largest remainder), `mode`, `quantile`, or `sample` (one draw from `seed`).
    """
    options = {"a": a, "gamma": gamma, "metric": metric, "statistic": statistic, "quantile": quantile, "seed": seed}
    return _from_prior("ibp_count", poisson_law, layers, budget, options)


def ibp_stick(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    a: float | int | None = None,
    gamma: float | int = 1.0,
    metric: str = "mmd",
    statistic: str = "mean",
    quantile: float | int = 0.9,
    seed: int = 0,
) -> RankPlan:
    """P(r_i >= k) = (α_i/(1+α_i))^k, the nested stick-breaking prior; arguments as in `ibp_count`."""
    options = {"a": a, "gamma": gamma, "metric": metric, "statistic": statistic, "quantile": quantile, "seed": seed}
    return _from_prior("ibp_stick", stick_law, layers, budget, options)


def beta_bernoulli(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    a: float | int | None = None,
    gamma: float | int = 1.0,
    metric: str = "mmd",
    statistic: str = "mean",
    quantile: float | int = 0.9,
    seed: int = 0,
    features: int | None = None,
) -> RankPlan:
    """r_i ~ Binomial(K, α_i/(K + α_i)), the finite beta-Bernoulli prior with K = `features` (by default the highest
    rank allowed in the layer); other arguments as in `ibp_count`."""
    options = {"a": a, "gamma": gamma, "metric": metric, "statistic": statistic, "quantile": quantile, "seed": seed}
    if features is not None and features < 1:
        raise ValueError(f"features must be at least 1, got {features}")

    def law(alpha: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return beta_bernoulli_law(alpha, low, high, None if features is None else np.full_like(high, features))

    plan = _from_prior("beta_bernoulli", law, layers, budget, options)
    return RankPlan(plan.ranks, plan.rule, plan.budget, {**plan.options, "features": features})


def _from_prior(
    rule: str, law: Law, layers: Sequence[LayerLike], budget: Budget | None, options: dict[str, object]
) -> RankPlan:
    records = as_layers(layers)
    statistic, a, gamma, share = (options[key] for key in ("statistic", "a", "gamma", "quantile"))
    if statistic not in STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}")
    if not 0 < share < 1:
        raise ValueError(f"quantile must lie between 0 and 1, got {share}")
    if a is not None and not a >= 0:
        raise ValueError(f"a must not be negative, got {a}")
    limit = need_budget(budget, rule, "or give rank.a") if a is None else budget
    gaps = gap_values(records, options["metric"], rule)
    unit = concentration(gaps, 1.0, gamma)
    if limit is None:
        low, high = np.zeros(len(records), dtype=int), np.array([layer.full_rank for layer in records])
    else:
        low, high = (np.array(bound) for bound in limit.bounds(records))
    uniforms = np.random.default_rng(options["seed"]).random(len(records))

    def means(level: float) -> np.ndarray:
        probability = law(level * unit, low, high)
        return probability @ np.arange(probability.shape[1])

    def ranks(level: float) -> np.ndarray:
        probability = law(level * unit, low, high)
        if statistic == "mean":
            return np.floor(probability @ np.arange(probability.shape[1]) + 1e-9).astype(int)
        if statistic == "mode":
            return probability.argmax(axis=1)
        target = np.full(len(records), float(share)) if statistic == "quantile" else uniforms
        below = np.cumsum(probability, axis=1) < target[:, None] - 1e-12
        return np.minimum(below.sum(axis=1), high)

    if a is not None:
        chosen = np.rint(means(float(a))).astype(int) if statistic == "mean" else ranks(float(a))
        named = {layer.name: int(rank) for layer, rank in zip(records, chosen, strict=True)}
        return RankPlan(named, rule, limit, options)
    level, named = share_along(records, limit, power(gaps, gamma), means, ranks)
    return RankPlan(named, rule, limit, {**options, "a": level})

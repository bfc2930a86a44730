"""Rules that read a spectrum per layer: every singular value is one unit of rank with its own worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from orca_rank.measuring.records import Layer, LayerLike, as_layers
from orca_rank.ranks.allocate import greedy
from orca_rank.ranks.plan import Budget, RankPlan
from orca_rank.ranks.rules import measured, measurement, need_budget

BELOW = 1e-9  # what a direction under the noise floor counts, against its own square


def ot_map(layers: Sequence[LayerLike], budget: Budget | None = None) -> RankPlan:
    """Rank from the optimal-transport map of the layer's inputs, ΔW = W (T − I); looks at no labels.

    Without a budget r_i is the number of singular values of ΔW Σ_t^{1/2} above the split-half null. With one, units are
    taken greedily by the share of the layer's output energy that they change, s_k² / ‖W Σ_t^{1/2}‖_F², per parameter;
    those under the null come last.
    """
    records = as_layers(layers)
    energy = measured(records, "ot_map", ("ot_map", "energy"))
    return _above_null(records, budget, "ot_map", energy)


def gradient(layers: Sequence[LayerLike], budget: Budget | None = None) -> RankPlan:
    """Rank from the gradient of the target loss at the start.

    Without a budget r_i is the number of singular values of the mean gradient above the sign-flip null. With one, units
    are taken greedily by s_k² per parameter, what one gradient step along that direction gains; those under the null
    come last. For L serial layers one update of rank k shows in each of them, so the counts may be up to L times k.
    """
    records = as_layers(layers)
    return _above_null(records, budget, "gradient", np.ones(len(records)))


def activation(layers: Sequence[LayerLike], budget: Budget | None = None, *, rho: float = 2.0) -> RankPlan:
    """EVA (Paischer et al., arXiv 2410.07170): explained-variance ratios of the target's inputs, pooled over layers,
    the largest taken until the budget is spent.

    Args:
        rho: no layer gets more than rho times the rank that the budget gives every layer alike, unless all the others
            are full: what the cap leaves over is then spent in the same order without it.
    """
    if not 1 <= rho < np.inf:
        raise ValueError(f"rho must be a finite number of at least 1, got {rho}")
    records = as_layers(layers)
    limit = need_budget(budget, "activation")
    energy = measured(records, "activation", ("activation", "energy"))
    values = [s**2 / total for s, total in zip(_values(records, "activation"), energy, strict=True)]
    even = limit.allowed(records) / sum(limit.unit_costs(records))
    cap = max(limit.r_min, int(np.ceil(rho * even)))
    capped = replace(limit, r_max=cap if limit.r_max is None else min(cap, limit.r_max))
    ranks = greedy(records, limit, values, start=greedy(records, capped, values))
    return RankPlan(ranks, "activation", limit, {"rho": rho})


def _above_null(records: list[Layer], budget: Budget | None, rule: str, energy: np.ndarray) -> RankPlan:
    null = measured(records, rule, (rule, "null"))
    spectra = _values(records, rule)
    if budget is None:
        counts = [int((s > floor).sum()) for s, floor in zip(spectra, null, strict=True)]
        ranks = {layer.name: min(count, layer.full_rank) for layer, count in zip(records, counts, strict=True)}
        return RankPlan(ranks, rule)
    values = [
        np.where(s > floor, 1.0, BELOW) * s**2 / total if total > 0 else 0 * s
        for s, floor, total in zip(spectra, null, energy, strict=True)
    ]
    return RankPlan(greedy(records, budget, values), rule, budget)


def _values(records: list[Layer], rule: str) -> list[np.ndarray]:
    measured(records, rule, (rule, "energy"))  # the whole measurement is there or not
    return [np.asarray(measurement(layer, (rule, "singular_values")), dtype=float) for layer in records]

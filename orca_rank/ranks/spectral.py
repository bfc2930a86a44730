"""Rules that read a spectrum per layer: every singular value is one unit of rank with its own worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from orca_rank.measuring.records import Layer, LayerLike, Spectrum, as_layers
from orca_rank.ranks.allocate import greedy
from orca_rank.ranks.plan import Budget, RankPlan
from orca_rank.ranks.rules import need_budget, read_all

BELOW = 1e-9  # what a direction under the noise floor counts, against its own square


def ot_map(layers: Sequence[LayerLike], budget: Budget | None = None) -> RankPlan:
    """Rank from the optimal-transport map of the layer's inputs, ΔW = W (T − I); looks at no labels.

    Without a budget r_i is the number of singular values of ΔW Σ_t^{1/2} above the split-half null. With one, units are
    taken greedily by the share of the layer's output energy that they change, s_k² / ‖W Σ_t^{1/2}‖_F², per parameter;
    those under the null come last.
    """
    records = as_layers(layers)
    found = _spectra(records, "ot_map")
    return _above_null(records, budget, "ot_map", found, [one.energy for one in found])


def gradient(layers: Sequence[LayerLike], budget: Budget | None = None) -> RankPlan:
    """Rank from the gradient of the target loss at the start.

    Without a budget r_i is the number of singular values of the mean gradient above the sign-flip null. With one, units
    are taken greedily by s_k² per parameter, what one gradient step along that direction gains; those under the null
    come last. For L serial layers one update of rank k shows in each of them, so the counts may be up to L times k.
    """
    records = as_layers(layers)
    return _above_null(records, budget, "gradient", _spectra(records, "gradient"), [1.0] * len(records))


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
    spectra = _spectra(records, "activation")
    values: list[np.ndarray] = [
        np.square(one.singular_values) / one.energy if one.energy > 0 else np.zeros(0) for one in spectra
    ]
    even = limit.allowed(records) / sum(limit.unit_costs(records))
    cap = max(limit.r_min, int(np.ceil(rho * even)))
    capped = replace(limit, r_max=cap if limit.r_max is None else min(cap, limit.r_max))
    ranks = greedy(records, limit, values, start=greedy(records, capped, values))
    return RankPlan(ranks, "activation", limit, {"rho": rho})


def _above_null(
    records: list[Layer], budget: Budget | None, rule: str, spectra: Sequence[Spectrum], energy: Sequence[float]
) -> RankPlan:
    null = read_all(records, rule, f"{rule}.null", lambda layer: layer.spectra[rule].null)
    squares = [np.square(one.singular_values) for one in spectra]
    above = [np.array(one.singular_values) > floor for one, floor in zip(spectra, null, strict=True)]
    if budget is None:
        counts = {layer.name: int(own.sum()) for layer, own in zip(records, above, strict=True)}
        return RankPlan({layer.name: min(counts[layer.name], layer.full_rank) for layer in records}, rule)
    values = [
        np.where(own, 1.0, BELOW) * square / total if total > 0 else 0 * square
        for square, own, total in zip(squares, above, energy, strict=True)
    ]
    return RankPlan(greedy(records, budget, values), rule, budget)


def _spectra(records: list[Layer], rule: str) -> list[Spectrum]:
    return read_all(records, rule, rule, lambda layer: layer.spectra.get(rule))

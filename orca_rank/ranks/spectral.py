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


def whitened_gradient(layers: Sequence[LayerLike], budget: Budget | None = None, *, least: int = 1) -> RankPlan:
    """Rank from the gradient of the target loss in whitened coordinates, Σ_δ^{-1/2} G Σ_x^{-1/2}.

    As `gradient`, but a unit counts by a squared correlation between inputs and gradients at the outputs, so that
    layers of large inputs or steep outputs have no more weight than others. Measured through a predictor that has
    learned (measure.fitted) it says what the layer lacks; through one of random weights it says little.

    Args:
        least: ranks of every layer, whatever stands above its null; 0 lets layers go without an adapter.

    Raises:
        ValueError: if `least` is no whole number >= 0, or more than the budget affords.
    """
    if isinstance(least, bool) or not isinstance(least, int) or least < 0:
        raise ValueError(f"rank.least must be a whole number of at least 0, received {least!r}")
    records, name = as_layers(layers), "whitened_gradient"
    spectra = _spectra(records, name)
    options = {"least": least}
    if budget is None:
        found = _above_null(records, None, name, spectra, []).ranks
        ranks = {layer.name: max(found[layer.name], min(least, layer.full_rank)) for layer in records}
        return RankPlan(ranks, name, None, options)
    floor = sum(min(least, one.full_rank) * cost for one, cost in zip(records, budget.unit_costs(records), strict=True))
    if floor > budget.allowed(records):
        raise ValueError(
            f"rank={name} gives every layer rank {least}, which spends {floor} of a budget of "
            f"{budget.allowed(records)}: raise the budget, or set rank.least=0"
        )
    plan = _above_null(records, budget.narrowed(least), name, spectra, [1.0] * len(records))
    return replace(plan, budget=budget, options=options)


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

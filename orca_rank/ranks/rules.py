"""Rules that need one number per layer: uniform, proportional and its controls, from_file, and scalar measurements.

Every rule is a function `(layers, budget, **options) -> RankPlan` of plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from orca_rank.measuring.records import Layer, LayerLike, as_layers
from orca_rank.ranks.allocate import power, share
from orca_rank.ranks.plan import Budget, RankPlan

T = TypeVar("T")
P_VALUES = "gap.permutations > 0 (of the metrics other than mmd, energy and sliced: gap.slow.permutations > 0)"


class MissingMeasurement(ValueError):
    """A rule reads what stage=measure has not measured."""


def uniform(
    layers: Sequence[LayerLike], budget: Budget | None = None, *, r: int | None = None, allow_above_full: bool = False
) -> RankPlan:
    """The same rank everywhere: `r` if given (the budget is then not used), otherwise what the budget affords.

    Raises:
        ValueError: if r is above min(d_in, d_out) of a layer and `allow_above_full` is not set.
    """
    records = as_layers(layers)
    options = {"r": r, "allow_above_full": allow_above_full}
    if r is not None:
        plan = RankPlan({layer.name: r for layer in records}, "uniform", None, options, allow_above_full)
        return plan.check(records)
    limit = need_budget(budget, "uniform", "or give rank.r")
    return RankPlan(share(records, limit, np.ones(len(records))), "uniform", limit, options)


def proportional(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    gamma: float = 1.0,
    metric: str = "mmd",
    p_max: float | None = None,
) -> RankPlan:
    """r_i ∝ D_i^γ under the budget (`allocate.share`); a gap at or below 0 counts as 0 and leaves the layer at r_min.

    Args:
        gamma: exponent; 0 is uniform, 1 the hypothesis "rank in proportion to the gap".
        metric: which calibrated gap.
        p_max: count a gap as 0 if its permutation p-value is above this; by default all count.
    """
    records = as_layers(layers)
    limit = need_budget(budget, "proportional")
    gaps = gap_values(records, metric, "proportional", p_max)
    options = {"gamma": gamma, "metric": metric, "p_max": p_max}
    return RankPlan(share(records, limit, power(gaps, gamma)), "proportional", limit, options)


def shuffled(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    gamma: float = 1.0,
    metric: str = "mmd",
    p_max: float | None = None,
    permutation: int = 0,
) -> RankPlan:
    """`proportional` with the gaps permuted over the layers: the control that tells whether it matters *which* layer
    gets the ranks, or only their histogram. Same budget, same gaps, another order.

    Args:
        permutation: seed of the order; not the run's seed, so that one order can be trained with several seeds.
    """
    records = as_layers(layers)
    limit = need_budget(budget, "shuffled")
    gaps = gap_values(records, metric, "shuffled", p_max)
    order = np.random.default_rng(permutation).permutation(len(records))
    options = {"gamma": gamma, "metric": metric, "p_max": p_max, "permutation": permutation}
    return RankPlan(share(records, limit, power(gaps[order], gamma)), "shuffled", limit, options)


def inverse(
    layers: Sequence[LayerLike], budget: Budget | None = None, *, gamma: float = 1.0, metric: str = "mmd"
) -> RankPlan:
    """r_i ∝ 1/D_i^γ under the budget: the hypothesis against `proportional`, that layers near the target need most.

    A gap at or below 0 counts as the smallest positive one of the layers, for calibrated gaps of layers that do not
    differ scatter around 0; where none is positive all layers are alike. Among small gaps 1/D tells noise apart too:
    budget.r_max bounds what one layer can take.

    Args:
        gamma: exponent >= 0; 0 is uniform. metric: which calibrated gap.

    Raises:
        ValueError: if gamma is negative or no finite number.
    """
    records = as_layers(layers)
    limit = need_budget(budget, "inverse")
    if not np.isfinite(gamma) or gamma < 0:
        raise ValueError(f"gamma of rank=inverse must be a finite number >= 0, got {gamma!r}: r_i ∝ 1/D_i^gamma")
    gaps = gap_values(records, metric, "inverse")
    least = gaps[gaps > 0].min(initial=np.inf)
    weights = (least / np.maximum(gaps, least)) ** gamma if np.isfinite(least) else np.ones(len(records))
    return RankPlan(share(records, limit, weights), "inverse", limit, {"gamma": gamma, "metric": metric})


def from_file(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    path: str | Path | None = None,
    allow_above_full: bool = False,
) -> RankPlan:
    """A plan from a file, see `RankPlan.load`. No budget is applied.

    Raises:
        FileNotFoundError: if there is no such file. ValueError: if it is not a plan of exactly these layers.
    """
    if path is None:
        raise ValueError("rank=from_file needs the path of a rank plan: set rank.path=<file.json>")
    plan = RankPlan.load(path)
    options = {"path": str(Path(path)), "allow_above_full": allow_above_full}
    return RankPlan(plan.ranks, "from_file", None, options, allow_above_full or plan.allow_above_full).check(layers)


def stable_rank(
    layers: Sequence[LayerLike], budget: Budget | None = None, *, statistic: str = "stable_rank"
) -> RankPlan:
    """r_i ∝ the stable rank ‖W‖_F²/‖W‖₂² of the pretrained weight (SR-LoRA, ICCV 2025): looks at no data.

    Args:
        statistic: `stable_rank`, or `effective_rank` = exp of the entropy of s/Σs.
    """
    if statistic not in ("stable_rank", "effective_rank"):
        raise ValueError(f"statistic must be stable_rank or effective_rank, got {statistic!r}")

    def read(layer: Layer) -> float | None:
        if layer.weight is None:
            return None
        return layer.weight.stable_rank if statistic == "stable_rank" else layer.weight.effective_rank

    return _by_number(layers, budget, "stable_rank", f"weight.{statistic}", read, {"statistic": statistic})


def importance(layers: Sequence[LayerLike], budget: Budget | None = None, *, gamma: float = 1.0) -> RankPlan:
    """r_i ∝ (mean |W ⊙ G|)^γ, G the gradient of the target loss at the start (GoRA, arXiv 2502.12171)."""
    options = {"gamma": gamma}
    return _by_number(layers, budget, "importance", "importance", lambda layer: layer.importance, options, gamma)


def fisher(layers: Sequence[LayerLike], budget: Budget | None = None, *, gamma: float = 1.0) -> RankPlan:
    """r_i ∝ (mean diagonal of the empirical Fisher information)^γ, from per-image gradients."""
    return _by_number(layers, budget, "fisher", "fisher", lambda layer: layer.fisher, {"gamma": gamma}, gamma)


def gelora(layers: Sequence[LayerLike], budget: Budget | None = None) -> RankPlan:
    """r_i = max(d_{i+1} − d_i, 0) + 1 with d_i, d_{i+1} the intrinsic dimensions (TwoNN) of the target's hidden states
    before and after the layer's block, the same for all layers of a block (GeLoRA, arXiv 2412.09250). With a budget: in
    proportion to it; without: rounded up."""
    records = as_layers(layers)
    found = read_all(records, "gelora", "intrinsic_dimension", lambda layer: layer.intrinsic_dimension)
    weights = np.array([max(one.output - one.input, 0.0) + 1 for one in found])
    if budget is not None:
        return RankPlan(share(records, budget, weights), "gelora", budget)
    ranks = [min(int(np.ceil(weight)), layer.full_rank) for weight, layer in zip(weights, records, strict=True)]
    return RankPlan({layer.name: rank for layer, rank in zip(records, ranks, strict=True)}, "gelora")


def need_budget(budget: Budget | None, rule: str, hint: str = "") -> Budget:
    """The budget, or an error that says how to set one."""
    if budget is None:
        alternative = f" ({hint})" if hint else ""
        raise ValueError(
            f"rank rule {rule} spends a budget: set budget.mean_rank, .total_rank or .parameters{alternative}"
        )
    return budget


def gap_values(
    layers: Sequence[Layer], metric: str, rule: str, p_max: float | None = None
) -> Float[np.ndarray, " layers"]:
    """The calibrated gaps D_i >= 0 of one metric; see `proportional`.

    Raises:
        MissingMeasurement: if a layer has no such gap, or no p-value of it where one is asked for.
    """
    option = f"'{metric}' among gap.metrics (gap=all has all)"
    gaps = _complete(layers, [layer.gap.get(metric) for layer in layers], f"the gap '{metric}'", rule, option)
    values = [gap.value for gap in gaps]
    if p_max is not None:
        p_values = _complete(layers, [gap.p for gap in gaps], f"p-values of the gap '{metric}'", rule, P_VALUES)
        values = [value if p <= p_max else 0.0 for value, p in zip(values, p_values, strict=True)]
    return np.maximum(np.array(values, dtype=float), 0.0)


def read_all(layers: Sequence[Layer], rule: str, name: str, read: Callable[[Layer], T | None]) -> list[T]:
    """What `read` finds in every layer, a measurement called `name`.

    Raises:
        MissingMeasurement: if a layer lacks it, naming the option of stage=measure that turns it on.
    """
    option = f"gap.measurements.{name.partition('.')[0]}=true"
    return _complete(layers, [read(layer) for layer in layers], f"the measurement '{name}'", rule, option)


def _by_number(
    layers: Sequence[LayerLike],
    budget: Budget | None,
    rule: str,
    name: str,
    read: Callable[[Layer], float | None],
    options: dict[str, Any],
    gamma: float = 1.0,
) -> RankPlan:
    records = as_layers(layers)
    limit = need_budget(budget, rule)
    values = np.maximum(np.array(read_all(records, rule, name, read)), 0.0)
    return RankPlan(share(records, limit, power(values, gamma)), rule, limit, options)


def _complete(layers: Sequence[Layer], values: Sequence[T | None], what: str, rule: str, option: str) -> list[T]:
    missing = [layer.name for layer, value in zip(layers, values, strict=True) if value is None]
    if missing:
        raise MissingMeasurement(
            f"rank rule {rule} needs {what} of every layer; {len(missing)} of {len(layers)} lack it "
            f"({missing[0]}, ...): run `python -m orca_rank stage=measure` with {option}"
        )
    return [value for value in values if value is not None]

"""Spend a budget of ranks: in proportion to a weight, or greedily by the value of every further unit."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from orca_rank.measuring.records import Layer
from orca_rank.ranks.plan import Budget, RankPlan

ENOUGH = 0.99  # share of the budget above which layers of weight 0 are left alone
LARGEST_LEVEL = 1e9  # no prior asks for a mean rank beyond this
TINY = 1e-9  # two remainders closer than this are a tie


def power(values: Float[np.ndarray, " layers"], gamma: float) -> Float[np.ndarray, " layers"]:
    """Weights (D_i / max D)^γ of measurements D_i >= 0; all zeros stay zeros for γ > 0.

    Raises:
        ValueError: if gamma is no finite number, or gives a layer an infinite weight (a negative one where D_i = 0).
    """
    if not isinstance(gamma, Real) or not np.isfinite(gamma):
        raise ValueError(f"gamma must be a finite number, got {gamma!r}")
    top = values.max(initial=0.0)
    with np.errstate(divide="ignore", over="ignore"):
        weights = np.power(values / top if top > 0 else values, float(gamma))
    if not np.isfinite(weights).all():
        raise ValueError(f"gamma={gamma} gives a layer whose measurement is 0 an infinite weight: use gamma >= 0")
    return weights


def share(layers: Sequence[Layer], budget: Budget, weights: ArrayLike) -> dict[str, int]:
    """Ranks in proportion to `weights`: the real shares q_i = clip(λ w_i, r_min, high_i) with Σ c_i q_i = B are rounded
    down, and what is left goes, unit by unit, to the affordable layer with the largest remainder q_i − r_i.

    With unit costs this is Hamilton's method of largest remainders with caps; it is monotone: more weight for one layer
    never lowers its rank. Ties go to the earlier layer. A layer of weight 0 stays at r_min while the others can use
    the budget; only when they are full and more than 1 % is left is the rest spread evenly over the layers of weight 0.

    Args:
        weights: (layers,) finite and >= 0, one per layer.

    Raises:
        ValueError: if a weight is negative or not finite, or r_min alone exceeds the budget.
    """
    values = np.asarray(weights, dtype=float)
    if values.shape != (len(layers),) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"weights must be {len(layers)} finite numbers >= 0, got {values.tolist()}")
    low, high = (np.array(bound) for bound in budget.bounds(layers))
    costs, allowed = np.array(budget.unit_costs(layers)), budget.allowed(layers)
    positive = values > 0
    ranks = _fill(values, low, np.where(positive, high, low), costs, allowed)
    if (costs * ranks).sum() < ENOUGH * allowed:
        ranks = _fill((~positive).astype(float), ranks, np.where(positive, ranks, high), costs, allowed)
    return {layer.name: int(rank) for layer, rank in zip(layers, ranks, strict=True)}


def share_along(
    layers: Sequence[Layer],
    budget: Budget,
    weights: ArrayLike,
    quotas: Callable[[float], np.ndarray],
    start: Callable[[float], np.ndarray],
) -> tuple[float, dict[str, int]]:
    """`share` along another path than λ w: the largest level at which the budget affords `start(level)`, and then
    what is left goes to the largest `quotas(level)` − rank.

    Args:
        weights: (layers,) a layer of weight 0 is served last, as in `share`.
        quotas, start: level >= 0 -> (layers,) real and integer ranks within the bounds, not decreasing in the level.

    Returns:
        the level and the ranks.
    """
    low, high = (np.array(bound) for bound in budget.bounds(layers))
    costs, allowed = np.array(budget.unit_costs(layers)), budget.allowed(layers)
    positive = np.asarray(weights, dtype=float) > 0
    level = _largest(lambda level: (costs * start(level)).sum() <= allowed, LARGEST_LEVEL)
    ranks = _spend(quotas(level), start(level).astype(int), np.where(positive, high, low), costs, allowed)
    if (costs * ranks).sum() < ENOUGH * allowed:
        ranks = _fill((~positive).astype(float), ranks, np.where(positive, ranks, high), costs, allowed)
    return level, {layer.name: int(rank) for layer, rank in zip(layers, ranks, strict=True)}


def greedy(
    layers: Sequence[Layer], budget: Budget, values: Sequence[ArrayLike], start: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Take units in the order of their value per cost until none is affordable.

    Args:
        values: per layer the worth of its first, second, ... unit, not increasing (each is cut to its running minimum,
            so that unit k + 1 never comes before unit k). Units beyond the list are worth nothing: last, evenly.
        start: ranks within the budget to go on from, by default r_min.

    Raises:
        ValueError: if a value is not finite, or r_min alone exceeds the budget.
    """
    low, high = budget.bounds(layers)
    costs = budget.unit_costs(layers)
    ranks = low if start is None else [start[layer.name] for layer in layers]
    left = budget.allowed(layers) - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    worth = [np.minimum.accumulate(np.maximum(np.asarray(value, dtype=float), 0)) for value in values]
    if any(not np.isfinite(value).all() for value in worth):
        raise ValueError("the values of rank units must be finite numbers")

    def entry(index: int) -> tuple[float, int, int]:
        rank = ranks[index]
        gain = worth[index][rank] if rank < len(worth[index]) else 0.0
        return (-float(gain) / costs[index], rank, index)

    heap = [entry(index) for index in range(len(ranks)) if ranks[index] < high[index]]
    heapq.heapify(heap)
    while heap:
        index = heapq.heappop(heap)[-1]
        if costs[index] > left:
            continue  # what is left only shrinks: this layer is done
        ranks[index] += 1
        left -= costs[index]
        if ranks[index] < high[index]:
            heapq.heappush(heap, entry(index))
    return {layer.name: rank for layer, rank in zip(layers, ranks, strict=True)}


def spent(plan: RankPlan, layers: Sequence[Layer], budget: Budget) -> float:
    """used / allowed, 1 for an empty budget."""
    allowed = budget.allowed(layers)
    return budget.used(plan, layers) / allowed if allowed else 1.0


def _fill(weights: np.ndarray, low: np.ndarray, high: np.ndarray, costs: np.ndarray, allowed: int) -> np.ndarray:
    if not (weights > 0).any():
        return low.copy()
    real = _water_level(weights, low, high, costs, allowed)
    return _spend(real, np.floor(real + TINY).astype(int), high, costs, allowed)


def _water_level(weights: np.ndarray, low: np.ndarray, high: np.ndarray, costs: np.ndarray, allowed: int) -> np.ndarray:
    """clip(λ w, low, high) with the largest λ that costs at most `allowed`; exact, because the cost is linear in λ
    between the points where a layer leaves its floor or meets its ceiling."""

    def quotas(level: float) -> np.ndarray:
        return np.clip(level * weights, low, high)

    some = weights > 0
    with np.errstate(over="ignore"):
        knots = np.unique(np.concatenate([[0.0], low[some] / weights[some], high[some] / weights[some]]))
    knots = knots[np.isfinite(knots)]
    spending = np.array([(costs * quotas(knot)).sum() for knot in knots])
    last = int(np.searchsorted(spending, allowed, side="right")) - 1
    if last + 1 >= len(knots):
        return quotas(knots[-1])
    fraction = (allowed - spending[last]) / (spending[last + 1] - spending[last])
    return quotas(knots[last]) + fraction * (quotas(knots[last + 1]) - quotas(knots[last]))


def _largest(affordable: Callable[[float], bool | np.bool_], top: float) -> float:
    """The largest level in [0, top] that is affordable, by bisection; affordable(0) holds."""
    if affordable(top):
        return top
    below, above = 0.0, top
    for _ in range(90):
        middle = (below + above) / 2
        below, above = (middle, above) if affordable(middle) else (below, middle)
    return below


def _spend(quotas: np.ndarray, ranks: np.ndarray, high: np.ndarray, costs: np.ndarray, allowed: int) -> np.ndarray:
    left = allowed - int((costs * ranks).sum())
    while (affordable := (ranks < high) & (costs <= left)).any():
        remainder = np.where(affordable, np.round(quotas - ranks, 9), -np.inf)
        chosen = int(np.argmax(remainder))  # the first of equals
        ranks[chosen] += 1
        left -= int(costs[chosen])
    return ranks

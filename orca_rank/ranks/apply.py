"""A rule applied to layers: the plan, checked against the layers and the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from orca_rank.measuring.records import Layer
from orca_rank.ranks.group import averaged
from orca_rank.ranks.plan import Budget, RankPlan


def apply(
    rule: Callable[..., Any], layers: Sequence[Layer], budget: Budget | None, group: str | None = None
) -> RankPlan:
    """The plan that a rule makes of the layers, their measurements shared by `group` (see `averaged`), with the layers'
    shapes.

    Args:
        rule: (layers, budget) -> RankPlan.

    Raises:
        TypeError: if the rule gives something else. ValueError: for a plan that does not fit the layers, or a budget
            that full ranks in all layers would not spend.
    """
    plan = rule(averaged(layers, group), budget)
    if not isinstance(plan, RankPlan):
        raise TypeError(f"a rank rule gives a RankPlan({{layer: rank}}), this one gave a {type(plan).__name__}")
    plan.check(layers)
    if budget is not None and plan.budget is not None:  # a rule that knows its ranks uses none
        _within(budget, layers)
    return replace(plan, shapes={layer.name: (layer.d_in, layer.d_out) for layer in layers})


def _within(budget: Budget, layers: Sequence[Layer]) -> None:
    """Refuse a budget that full ranks in all layers would not spend."""
    full = sum(layer.full_rank * cost for layer, cost in zip(layers, budget.unit_costs(layers), strict=True))
    if budget.allowed(layers) > full:
        name = next(name for name in ("mean_rank", "total_rank", "parameters") if getattr(budget, name) is not None)
        most = full / len(layers) if name == "mean_rank" else full
        raise ValueError(
            f"budget.{name}={getattr(budget, name):g}: expected a number of at most {most:g}, the full rank of all "
            f"{len(layers)} layers; adapter=full trains them whole"
        )

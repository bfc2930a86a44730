"""From gaps and a budget to a rank plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orca_rank import ranks
from orca_rank.api.gaps import Gaps
from orca_rank.measuring.records import as_layers
from orca_rank.ranks import Budget, Layer, MissingMeasurement, RankPlan

# Beside `ranks.RULES`, those that read something else than layers: a pattern, a file, losses or updates.
RULES: dict[str, Callable[..., RankPlan]] = {
    **ranks.RULES,
    **{rule.__name__: rule for rule in (ranks.only, ranks.from_file, ranks.posterior, ranks.theory, ranks.trained)},
}


def plan(
    gaps: Gaps | Sequence[Layer | Mapping[str, Any]] | str | Path,
    rule: str | Callable[..., RankPlan] = "recommended",
    *,
    parameters: int | None = None,
    mean_rank: float | None = None,
    total_rank: int | None = None,
    r_min: int = 0,
    r_max: int | None = None,
    group: str | None = None,
    **options: Any,
) -> RankPlan:
    """A rank for every layer, by a rule under a budget, as stage=plan makes it; it prints itself as a table.

    Args:
        gaps: what `measure` gave, `layers` for a rule that needs no measurement, or the path of a layers.json.
        rule: a name in `orca_rank.ranks`, such as recommended, uniform, proportional or ot_map; or a function
            (layers, budget, **options) -> RankPlan.
        parameters, mean_rank, total_rank, r_min, r_max: the budget, at most one of the first three, see `Budget`;
            none for a rule that knows how many ranks it wants.
        group: "block", "stage" or "module": layers of a group share the mean of their measurements.
        options: of the rule, such as gamma=0.5 or metric="sliced".

    Returns:
        a `RankPlan`: `.ranks` is {layer: rank}, `.to_peft()` are the arguments of a PEFT LoraConfig, and
        `orca_rank.inject(model, plan)` adapts the model itself.

    Raises:
        ValueError: for an unknown rule or option, a budget that means nothing, or a measurement that the rule lacks.
            TypeError: for a rule of one's own that gives no RankPlan.
    """
    records = as_layers(Gaps.load(gaps) if isinstance(gaps, str | Path) else gaps)
    function = partial(_rule(rule, options), **options)
    budget = None
    if any(value is not None for value in (parameters, mean_rank, total_rank)):
        budget = Budget(mean_rank, total_rank, parameters, r_min, r_max)
    elif r_min or r_max is not None:
        raise ValueError(
            f"r_min={r_min} and r_max={r_max} bound the ranks of a budget: give one of parameters, mean_rank and "
            f"total_rank too"
        )
    try:
        return ranks.apply(function, records, budget, group)
    except MissingMeasurement as error:
        raise MissingMeasurement(
            f"{error}; in Python by orca_rank.measure(..., metrics=[...]) or measurements=[...] with these names"
        ) from error


def _rule(rule: str | Callable[..., RankPlan], options: Mapping[str, Any]) -> Callable[..., RankPlan]:
    """The function behind a rule, after a check that it takes the options."""
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"there is no rank rule {rule!r}; there are {', '.join(RULES)}")
        rule = RULES[rule]
    try:
        inspect.signature(rule).bind((), None, **options)
    except TypeError as error:
        name = getattr(rule, "__name__", type(rule).__name__)
        raise ValueError(f"the rank rule {name}: {error}; options are keyword arguments of (layers, budget)") from error
    return rule

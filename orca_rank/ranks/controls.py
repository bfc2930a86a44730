"""Rules that ignore every measurement: what is recommended, and a control that a comparison must notice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from orca_rank.measuring.records import LayerLike, as_layers
from orca_rank.ranks.allocate import share
from orca_rank.ranks.plan import Budget, RankPlan
from orca_rank.ranks.rules import need_budget, uniform

MANY = 16  # 5 and 7 % above full fine-tuning's error on Darcy flow, at 32×32 and at 64×64 (README)


def recommended(layers: Sequence[LayerLike], budget: Budget | None = None) -> RankPlan:
    """One rank for all layers, as much as the budget affords, or 16 without a budget (a smaller layer its full rank).

    It is what the committed evidence supports: on Darcy flow ranks in proportion to the gap do as well as the same
    ranks shuffled, and no rule could be told from uniform ones (docs/evidence.md); a published comparison finds Fisher
    ranks equal to uniform ones (arXiv 2605.16800). Whether rank matters at all on a task of one's own, and at which
    rate, is what `stage=evidence` answers.
    """
    if budget is not None:
        return replace(uniform(layers, budget), rule="recommended")
    return RankPlan({layer.name: min(MANY, layer.full_rank) for layer in as_layers(layers)}, "recommended")


def only(layers: Sequence[LayerLike], budget: Budget | None = None, *, pattern: str | None = None) -> RankPlan:
    """The same rank in every layer whose name matches, 0 (or the budget's r_min) in all others.

    Args:
        pattern: regular expression, searched in the layers' names, e.g. `mlp\\.` or `^layers\\.3\\.`.

    Raises:
        ValueError: without a pattern, or for one that is no expression or matches no layer.
    """
    records = as_layers(layers)
    limit = need_budget(budget, "only")
    if pattern is None:
        raise ValueError("rank=only needs the layers it is for: set rank.pattern=<regular expression>")
    try:
        chosen = np.array([re.search(pattern, layer.name) is not None for layer in records], dtype=float)
    except re.error as error:
        raise ValueError(f"rank.pattern is not a regular expression: {pattern!r} ({error})") from error
    if not chosen.any():
        names = ", ".join(layer.name for layer in records[:4])
        raise ValueError(f"rank.pattern={pattern!r} matches none of the {len(records)} layers, for example {names}")
    return RankPlan(share(records, limit, chosen), "only", limit, {"pattern": pattern})

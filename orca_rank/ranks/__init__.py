"""Rank plans: pure functions from measurements and a budget to a rank per layer."""

from orca_rank.ranks.plan import Budget, Layer, RankPlan
from orca_rank.ranks.prior_rules import beta_bernoulli, ibp_count, ibp_stick
from orca_rank.ranks.rules import (
    fisher,
    from_file,
    gelora,
    importance,
    proportional,
    shuffled,
    stable_rank,
    uniform,
)

__all__ = [
    "Budget",
    "Layer",
    "RankPlan",
    "beta_bernoulli",
    "fisher",
    "from_file",
    "gelora",
    "ibp_count",
    "ibp_stick",
    "importance",
    "proportional",
    "shuffled",
    "stable_rank",
    "uniform",
]

"""Rank plans: pure functions from measurements and a budget to a rank per layer."""

from orca_rank.measuring.records import Layer
from orca_rank.ranks.apply import apply
from orca_rank.ranks.controls import only, recommended
from orca_rank.ranks.gora import gora
from orca_rank.ranks.group import averaged
from orca_rank.ranks.plan import Budget, RankPlan
from orca_rank.ranks.posterior import posterior
from orca_rank.ranks.prior_rules import beta_bernoulli, ibp_count, ibp_stick
from orca_rank.ranks.rules import (
    MissingMeasurement,
    fisher,
    from_file,
    gelora,
    importance,
    inverse,
    proportional,
    shuffled,
    stable_rank,
    uniform,
)
from orca_rank.ranks.spectral import activation, gradient, ot_map, whitened_gradient
from orca_rank.ranks.theory import theory
from orca_rank.ranks.trained import trained

__all__ = [
    "RULES",
    "Budget",
    "Layer",
    "MissingMeasurement",
    "RankPlan",
    "activation",
    "apply",
    "averaged",
    "beta_bernoulli",
    "fisher",
    "from_file",
    "gelora",
    "gora",
    "gradient",
    "ibp_count",
    "ibp_stick",
    "importance",
    "inverse",
    "only",
    "ot_map",
    "posterior",
    "proportional",
    "recommended",
    "shuffled",
    "stable_rank",
    "theory",
    "trained",
    "uniform",
    "whitened_gradient",
]

# The rules that need nothing but layers and a budget, by name.
RULES = {
    rule.__name__: rule
    for rule in (
        uniform,
        recommended,
        proportional,
        shuffled,
        inverse,
        ot_map,
        gradient,
        whitened_gradient,
        activation,
        stable_rank,
        importance,
        fisher,
        gelora,
        gora,
        ibp_count,
        ibp_stick,
        beta_bernoulli,
    )
}

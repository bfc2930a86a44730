"""Distances between two samples x (n, d) and y (m, d): pure functions, differentiable where a loss may use them."""

from orca_rank.distances.gaussian import bures_wasserstein
from orca_rank.distances.legacy import legacy_otdd
from orca_rank.distances.mmd import MovingBandwidth, energy_distance, mmd
from orca_rank.distances.otdd import OTDDResult, OTDDSource, otdd
from orca_rank.distances.sliced import sliced_wasserstein
from orca_rank.distances.two_sample import knn_two_sample, permutation_p_value, proxy_a_distance

__all__ = [
    "MovingBandwidth",
    "OTDDResult",
    "OTDDSource",
    "bures_wasserstein",
    "energy_distance",
    "knn_two_sample",
    "legacy_otdd",
    "mmd",
    "otdd",
    "permutation_p_value",
    "proxy_a_distance",
    "sliced_wasserstein",
]

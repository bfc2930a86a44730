"""GoRA's ranks: by how much the target's gradient asks of every weight (He et al. 2025, arXiv 2502.12171)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from orca_rank.measuring.records import LayerLike, as_layers
from orca_rank.ranks.allocate import share
from orca_rank.ranks.plan import Budget, RankPlan
from orca_rank.ranks.rules import need_budget, read_all


def gora(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    r0: int | None = None,
    least: float = 0.5,
    most: float = 4.0,
) -> RankPlan:
    """r_i ∝ w_i / √(d_in + d_out), between r₀/2 and 4 r₀; w_i = mean |W ⊙ G| with G the mean gradient of the target.

    Under a budget r₀ is the rank that it gives every layer alike, and the shares are scaled until the budget is spent
    (`allocate.share`). With `r0` the budget is not used, and the ranks are those of the paper's algorithm,
    round(a_i r₀ Σ_j √c_j / √c_i) with a_i = w_i / Σ w and c = d_in + d_out: their parameters may be more or fewer than
    those of r₀ everywhere. Its other half is adapter=gora, which starts B from the same gradient.

    Args:
        r0: the paper's reference rank, instead of a budget. least, most: no rank below least·r₀ or above most·r₀, but
            for a layer's full rank and the budget's own bounds.

    Raises:
        ValueError: for bounds that are not 0 <= least <= 1 <= most, an r0 below 1, or neither a budget nor an r0.
    """
    if not 0 <= least <= 1 <= most < np.inf:
        raise ValueError(f"rank=gora needs 0 <= least <= 1 <= most, received least={least}, most={most}")
    if r0 is not None and (isinstance(r0, bool) or not isinstance(r0, int) or r0 < 1):
        raise ValueError(f"rank.r0 must be a whole number of at least 1, or null to use the budget, received {r0!r}")
    records = as_layers(layers)
    found = np.maximum(np.array(read_all(records, "gora", "importance", lambda layer: layer.importance)), 0.0)
    roots = np.sqrt([layer.cost for layer in records])
    options = {"r0": r0, "least": least, "most": most}
    if r0 is None:
        limit = need_budget(budget, "gora", "or give rank.r0")
        low, high = _bounds(limit.allowed(records) / sum(limit.unit_costs(records)), least, most)
        return RankPlan(share(records, limit.narrowed(low, high), _weights(found, roots)), "gora", limit, options)
    low, high = _bounds(r0, least, most)
    wanted = np.round(r0 * roots.sum() * _weights(found, np.ones(len(records))) / roots)
    ranks = np.clip(wanted, low, high).astype(int)
    return RankPlan(
        {layer.name: min(int(rank), layer.full_rank) for layer, rank in zip(records, ranks, strict=True)},
        "gora",
        None,
        options,
    )


def _bounds(r0: float, least: float, most: float) -> tuple[int, int]:
    """The whole ranks from least·r₀ to most·r₀; never more than ⌊r₀⌋ everywhere, which a budget of r₀ affords."""
    return min(math.ceil(least * r0), math.floor(r0)), max(math.floor(most * r0), 1)


def _weights(importance: np.ndarray, roots: np.ndarray) -> np.ndarray:
    """w_i / √c_i, summing to 1 at equal roots; alike where nothing has a gradient."""
    total = importance.sum()
    return (importance / total if total > 0 else np.full(len(importance), 1 / len(importance))) / roots

"""The posterior of a layer's rank from held-out losses of a DyLoRA model.

    P(r | D, held-out) ∝ prior(r; α) exp(−λ Σ_m ℓ_m(r)),   m over held-out images,

ℓ_m(r) the loss of image m with this layer cut to rank r and the others at full rank. It speaks of the rank of least
risk, not of a "true" rank, and needs images that were not trained on: on training losses its sets hardly ever hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file

from orca_rank.measuring.records import LayerLike, as_layers
from orca_rank.ranks.allocate import greedy
from orca_rank.ranks.ibp import concentration, stick_law
from orca_rank.ranks.plan import Budget, RankPlan
from orca_rank.ranks.rules import gap_values

Losses = Float[np.ndarray, "ranks images"]


def posterior(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    losses: str | Path | Mapping[str, Losses] | None = None,
    ranks: Sequence[int] | None = None,
    tempering: float | None = None,
    a: float = 8.0,
    gamma: float = 1.0,
    metric: str | None = None,
) -> RankPlan:
    """Rank by its posterior. Without a budget: the most probable rank. With one: unit k of layer i is worth
    P(r_i >= k), taken greedily per parameter.

    Args:
        losses: a safetensors file of layer -> losses (ranks, images) with an entry `ranks`, or such a mapping.
        ranks: which ranks the rows are, ascending; by default the entry `ranks`, else 1, 2, ...
        tempering: λ; by default chosen for each layer by cross-validation over images.
        a, gamma, metric: the stick-breaking prior's mean rank, and how it follows the gap; metric None: not at all.

    Raises:
        ValueError: if a layer has no losses, or they do not fit the ranks. FileNotFoundError: if the file is not there.
    """
    records = as_layers(layers)
    options = {"tempering": tempering, "a": a, "gamma": gamma, "metric": metric}
    if losses is None:
        raise ValueError("rank=posterior needs held-out losses of a DyLoRA model: set rank.losses=<file.safetensors>")
    if not isinstance(losses, Mapping):
        options["losses"] = str(losses)
        if not Path(losses).is_file():
            raise FileNotFoundError(f"no losses at {losses}: set rank.losses to what the DyLoRA run wrote")
        losses = load_file(losses)
    if missing := [layer.name for layer in records if layer.name not in losses]:
        raise ValueError(f"the losses lack {missing[0]} and {len(missing) - 1} more layers")
    if odd := [layer.name for layer in records if losses[layer.name].shape != losses[records[0].name].shape]:
        raise ValueError(
            f"the losses of {records[0].name} have shape {losses[records[0].name].shape}, those of {odd[0]} "
            f"{losses[odd[0]].shape}: every layer needs the same (ranks, images)"
        )
    grid = _grid(losses[records[0].name], losses.get("ranks") if ranks is None else ranks)
    gaps = np.ones(len(records)) if metric is None else gap_values(records, metric, "posterior")
    alpha = np.maximum(concentration(gaps, a, gamma), 1e-6)
    chosen = {}
    for layer, own in zip(records, alpha, strict=True):
        prior = rank_prior(own, grid)
        values = losses[layer.name].astype(float)
        factor = choose_tempering(values) if tempering is None else float(tempering)
        chosen[layer.name] = rank_posterior(values, prior, factor)
    if budget is None:
        named = {name: int(grid[probability.argmax()]) for name, probability in chosen.items()}
        return RankPlan(named, "posterior", None, options)
    units = np.arange(1, grid.max() + 1)
    survival = [(chosen[layer.name][None] * (grid >= units[:, None])).sum(1) for layer in records]  # P(r >= k)
    return RankPlan(greedy(records, budget, survival), "posterior", budget, options)


def rank_prior(alpha: float, ranks: Int[np.ndarray, " ranks"]) -> Float[np.ndarray, " ranks"]:
    """The stick-breaking prior's mass of the ranks measured; a rank that was skipped counts for the next one above."""
    law = stick_law(np.array([float(alpha)]), np.array([0]), np.array([int(ranks.max())]))[0]
    return np.diff(np.cumsum(law)[ranks], prepend=0.0)


def rank_posterior(losses: Losses, prior: Float[np.ndarray, " ranks"], tempering: float) -> Float[np.ndarray, " ranks"]:
    """P(r) ∝ prior(r) exp(−λ Σ_m ℓ_m(r)).

    Raises:
        ValueError: if a loss is not finite or λ is negative.
    """
    if not np.isfinite(losses).all() or not tempering >= 0:
        raise ValueError(f"losses must be finite and the tempering not negative, got {tempering}")
    with np.errstate(divide="ignore"):
        log_weight = np.log(prior) - tempering * losses.sum(axis=1)
    weight = np.exp(log_weight - log_weight.max())
    return weight / weight.sum()


def choose_tempering(losses: Losses, *, folds: int = 5, seed: int = 0) -> float:
    """λ by cross-validation: half the largest λ at which no rank looks better than the best one by chance.

    With Δ_m(r) = ℓ_m(r) − ℓ_m(r̂), the critical λ solves E exp(−λ Δ(r)) = 1, to second order 2 E Δ / Var Δ (it is 1/σ²
    for squared errors with noise σ²; Grünwald and van Ommen, 2017). r̂ comes from the other folds, so that choosing it
    does not bias Δ; sums over ranks stand above and below, so that ranks alike count for little.

    Args:
        losses: (ranks, images) of one layer, of held-out images.

    Raises:
        ValueError: for fewer than two images a fold.
    """
    images = losses.shape[1]
    if images < 2 * folds:
        raise ValueError(f"cross-validation in {folds} folds needs at least {2 * folds} held-out images, got {images}")
    fold = np.random.default_rng(seed).permutation(images) % folds
    means, variances = 0.0, 0.0
    for index in range(folds):
        best = losses[:, fold != index].mean(axis=1).argmin()
        excess = losses[:, fold == index] - losses[best, fold == index]  # (ranks, images of the fold)
        means += excess.mean(axis=1).sum()
        variances += excess.var(axis=1, ddof=1).sum()
    return float(max(means, 0.0) / variances) if variances > 0 else 0.0


def credible_set(probability: Float[np.ndarray, " ranks"], level: float = 0.9) -> Bool[np.ndarray, " ranks"]:
    """The smallest set of ranks that holds `level` of the posterior."""
    order = np.argsort(-probability, kind="stable")
    count = int(np.searchsorted(np.cumsum(probability[order]), level - 1e-12)) + 1
    inside = np.zeros(len(probability), dtype=bool)
    inside[order[:count]] = True
    return inside


def _grid(losses: Losses, ranks: Sequence[int] | np.ndarray | None) -> np.ndarray:
    grid = np.arange(1, len(losses) + 1) if ranks is None else np.asarray(ranks, dtype=np.int64)
    if grid.shape != (len(losses),) or (np.diff(grid) <= 0).any() or grid[0] < 0:
        raise ValueError(
            f"the losses have {len(losses)} rows, the ranks are {grid.tolist()}: give one ascending rank a row"
        )
    return grid

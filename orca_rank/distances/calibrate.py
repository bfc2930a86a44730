"""Calibration: a gap that is 0 where nothing differs and means the same at every layer.

Raw discrepancies cannot be compared between layers: their bias grows with the dimension and shrinks with the number of
images, and their unit is the layer's. Here every term has the same number of images, the bias is measured on halves of
the same side and taken away, and what is left is divided by the layer's own spread: a squared Cohen's d.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from orca_rank.distances.draws import Counts, exchanges, side_draws, split_draws
from orca_rank.distances.scores import Metric, Score, make_score

ACROSS = ((0, 1),)
HALVES = ((0, 2), (1, 3), (0, 1), (2, 3))  # S₁T₁, S₂T₂, S₁S₂, T₁T₂


class Calibrated(NamedTuple):
    """A calibrated gap.

    value: the effect size. low, high: its 95 % bootstrap interval (NaN without bootstrap).
    p: permutation p-value of "source and target have one law" (NaN without permutations, and for a metric that reads
    labels, whose images cannot change sides).
    observed, null: the raw statistic and its permutation draws, for `family_p`.
    """

    value: float
    low: float
    high: float
    p: float
    observed: float
    null: Float[np.ndarray, " permutations"]


def calibrate(
    metric: Metric,
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m e"],
    x_label: Int[np.ndarray, " n"] | None = None,
    y_label: Int[np.ndarray, " m"] | None = None,
    *,
    splits: int = 8,
    bootstrap: int = 200,
    permutations: int = 199,
    seed: int = 0,
) -> Calibrated:
    """The gap between two samples of one layer's features, on a scale shared by all layers.

        D = { ½[D(S₁,T₁) + D(S₂,T₂)] − ½[D(S₁,S₂) + D(T₁,T₂)] } / scale,   averaged over random halves,

    with scale ½(tr Σ_S + tr Σ_T) for squared distances. It is about 0 under the null, about ‖t‖²/tr Σ for a mean shift
    t, and does not change with isotropic scale, shift or rotation. MMD and energy distance are unbiased already: their
    full-sample statistic stands in place of the braces and the spread of their own feature space is the scale.

    The image is the unit throughout: a row is one image, and halves, permutations and resampling move whole rows.

    Args:
        metric: a function (x (n, d), y (m, d)) -> number, or a `functools.partial` of one; those of
            `orca_rank.distances` have fast routes. A metric that needs labels (otdd) gets them.
        x, y: features, one row per image; the larger side is cut to the smaller at random.
        x_label, y_label: classes: halves are then stratified by class.
        splits: how many random halvings are averaged. bootstrap, permutations: how many draws; 0 for none.
        seed: the same seed and number of images give the same permutations at every layer, as `family_p` needs.

    Raises:
        ValueError: if the widths d and e differ, there are fewer than 8 images a side, or a value is not finite.
    """
    _check(x, y)
    n = min(len(x), len(y)) // 2 * 2
    keep_x, keep_y = _subset(len(x), n, [seed, 0]), _subset(len(y), n, [seed, 1])
    pooled = np.concatenate([x[keep_x], y[keep_y]]).astype(np.float64)
    labels = _pooled_labels(x_label, y_label, keep_x, keep_y)
    score = make_score(metric, pooled, labels)

    if score.unbiased:
        values = score.between(side_draws(n, bootstrap, seed), ACROSS)[:, 0]
        value, draws = float(values[0]), values[1:]
    else:
        effects = [_split_effect(score, halves) for halves in split_draws(labels, splits, bootstrap, seed)]
        value = float(np.mean([effect[0] for effect in effects]))
        draws = np.concatenate([effect[1:] for effect in effects])
    if not np.isfinite(value):
        raise ValueError(f"the metric gave {value}: it must return a finite number for finite features")
    low = high = p = float("nan")
    if bootstrap:
        low, high = value + np.quantile(draws - draws.mean(), [0.025, 0.975])
    observed, null = value, np.zeros(0)
    if permutations and score.exchangeable:
        statistic = score.exchanged(exchanges(n, permutations, seed))
        observed, null = float(statistic[0]), statistic[1:]
        p = float((1 + (null >= observed).sum()) / (1 + permutations))
    return Calibrated(value / score.scale, float(low) / score.scale, float(high) / score.scale, p, observed, null)


def family_p(
    observed: Float[np.ndarray, " layers"], null: Float[np.ndarray, "layers permutations"]
) -> Float[np.ndarray, " layers"]:
    """p-values that hold for all layers at once: Westfall and Young's max-T, each layer's statistic standardised by its
    own permutation draws. The draws of one column must come from one permutation of the images."""
    everything = np.concatenate([observed[:, None], null], axis=1)
    spread = everything.std(axis=1, keepdims=True)
    standard = (everything - everything.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    largest = standard.max(axis=0)
    return (largest[None, :] >= standard[:, :1] - 1e-12).mean(axis=1)


def standardise(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> tuple[np.ndarray, np.ndarray]:
    """Both sides with every feature at pooled mean 0 and variance 1."""
    pooled = np.concatenate([x, y]).astype(np.float64)
    spread = pooled.std(axis=0)
    scale = np.where(spread > 1e-12 * max(spread.max(), 1e-300), spread, np.inf)  # a constant feature says nothing
    return (x - pooled.mean(axis=0)) / scale, (y - pooled.mean(axis=0)) / scale


def whiten(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], components: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Both sides on their leading pooled principal components, each at variance 1.

    At most a quarter as many as there are images: with as many components as images, every whitened image is as far
    from all others, whatever the data."""
    pooled = np.concatenate([x, y]).astype(np.float64)
    mean = pooled.mean(axis=0)
    _, values, directions = np.linalg.svd(pooled - mean, full_matrices=False)
    kept = min(components, len(pooled) // 4, int((values > 1e-6 * values[0]).sum()))
    transform = directions[:kept].T / values[:kept] * np.sqrt(len(pooled))  # (d, kept)
    return (x - mean) @ transform, (y - mean) @ transform


def _check(x: np.ndarray, y: np.ndarray) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"source and target features differ in width: {x.shape} and {y.shape}")
    if min(len(x), len(y)) < 8:
        raise ValueError(
            f"a calibrated gap needs at least 8 images a side, got {len(x)} and {len(y)}: give more images, or raise "
            f"gap.samples"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features hold NaN or infinity: check the data and the embedder")


def _subset(size: int, n: int, seed: list[int]) -> np.ndarray:
    return np.arange(size) if size == n else np.sort(np.random.default_rng(seed).permutation(size)[:n])


def _pooled_labels(
    x_label: ArrayLike | None, y_label: ArrayLike | None, keep_x: np.ndarray, keep_y: np.ndarray
) -> np.ndarray:
    """Labels of the pooled rows; those of the two sides are never the same. One class where none are given."""
    left = np.zeros(len(keep_x), dtype=np.int64) if x_label is None else np.asarray(x_label)[keep_x].astype(np.int64)
    right = np.zeros(len(keep_y), dtype=np.int64) if y_label is None else np.asarray(y_label)[keep_y].astype(np.int64)
    return np.concatenate([left, right - right.min() + left.max() + 1])


def _split_effect(score: Score, halves: list[Counts]) -> np.ndarray:
    """½[D(S₁,T₁) + D(S₂,T₂)] − ½[D(S₁,S₂) + D(T₁,T₂)] for every row of counts."""
    values = score.between(halves, HALVES)
    return (values[:, 0] + values[:, 1] - values[:, 2] - values[:, 3]) / 2

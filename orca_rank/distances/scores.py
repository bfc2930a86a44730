"""Discrepancies between many groups of the same images, computed from what is common to all of them.

A group is a row of counts over the pooled images (how often each is in it), so that halves, permutations and bootstrap
resamples are one thing. MMD and energy distance use one kernel matrix for all groups, sliced Wasserstein one set of
projections. Features come to a metric centred and divided by √(½(tr Σ_S + tr Σ_T)), so every metric is free of scale; a
fixed `bandwidth` is in that unit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from orca_rank.distances.mmd import energy_distance, mmd, resolve_bandwidth
from orca_rank.distances.sliced import directions, sliced_wasserstein

Counts = Int[np.ndarray, "draws images"]
Pairs = Sequence[tuple[int, int]]
Metric = Callable[..., Any]  # (x (n, d), y (m, d)) -> number, or with labels (x, x_label, y, y_label)


class Score(NamedTuple):
    """between(groups, pairs): the metric between groups[i] and groups[j] for every (i, j), one column per pair.

    scale: what a gap is divided by. unbiased: whether the metric is already about 0 under the null.
    exchangeable: whether images may change sides under the null. With labels they may not: the classes of the two sides
    have nothing to do with each other, so every permuted side would have classes of both.
    """

    between: Callable[[Sequence[Counts], Pairs], Float[np.ndarray, "draws pairs"]]
    scale: float
    unbiased: bool
    exchangeable: bool = True


def make_score(metric: Metric, pooled: Float[np.ndarray, "images d"], labels: Int[np.ndarray, " images"]) -> Score:
    """The fast route of a known metric, or one that calls `metric` for every pair of groups.

    Args:
        metric: a function or a `functools.partial` of one. pooled: source rows first, then as many target rows.

    Raises:
        ValueError: if the features do not vary at all.
    """
    function, options = _unwrap(metric)
    n = len(pooled) // 2
    spread = float((pooled[:n].var(axis=0, ddof=1).sum() + pooled[n:].var(axis=0, ddof=1).sum()) / 2)
    if not spread > 1e-14 * float((pooled**2).sum(axis=1).mean()):
        raise ValueError("the features of a layer do not vary between images: no gap can be measured there")
    pooled = (pooled - pooled.mean(axis=0)) / np.sqrt(spread)
    if not has_fast_route(metric):
        return _general_score(metric, function, options, pooled, labels)
    return (
        _sliced_score(pooled, **options) if function is sliced_wasserstein else _kernel_score(function, options, pooled)
    )


def check_metric(name: str, metric: Metric) -> None:
    """Raise ValueError if a metric is given options that its function does not take: fast routes never call it."""
    function, options = _unwrap(metric)
    taken = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    if unknown := sorted(set(options) - set(taken)):
        raise ValueError(f"the metric {name} does not take {', '.join(unknown)}; its options are {', '.join(taken)}")


def has_fast_route(metric: Metric) -> bool:
    """Whether `make_score` shares its work between the groups for this metric."""
    function, options = _unwrap(metric)
    if function is mmd:
        plain = options.get("block") is None and options.get("features") is None
        return plain and options.get("unbiased", True)
    return function is energy_distance or (function is sliced_wasserstein and options.get("p", 2) == 2)


def _unwrap(metric: Metric) -> tuple[Metric, dict[str, Any]]:
    """The function behind nested partials and their keyword options."""
    options: dict[str, Any] = {}
    inner: Any = metric
    while isinstance(inner, functools.partial):
        inner, options = inner.func, {**inner.keywords, **options}
    return inner, options


def _kernel_score(function: Metric, options: dict[str, Any], pooled: np.ndarray) -> Score:
    """U-statistics mean k(x,x') + mean k(y,y') − 2 mean k(x,y), pairs of an image with itself left out.

    The scale is the spread of the feature space, k(x,x) − mean k(x,x'), averaged over the two sides.
    """
    norms = (pooled**2).sum(axis=1)
    squared = np.maximum(norms[:, None] + norms[None] - 2 * pooled @ pooled.T, 0)
    diagonal = 0.0
    if function is mmd:
        n, count = len(pooled) // 2, options.get("kernels", 1)
        halves = torch.from_numpy(pooled[:n]), torch.from_numpy(pooled[n:])
        h = resolve_bandwidth(*halves, options.get("bandwidth", "median"))
        kernel = sum(np.exp(-squared / (h * 2.0 ** (i - count // 2))) for i in range(count))
        diagonal = float(count)
    else:
        kernel = -np.sqrt(squared)
    kernel[np.diag_indices_from(kernel)] = 0.0

    def between(groups: Sequence[np.ndarray], pairs: Pairs) -> np.ndarray:
        weights = [group.astype(float) for group in groups]
        applied = [weight @ kernel for weight in weights]  # (draws, images)
        sizes = [weight.sum(1) for weight in weights]
        within = [
            (a * w).sum(1) / (s**2 - (w**2).sum(1)) for a, w, s in zip(applied, weights, sizes, strict=True)
        ]  # Σ_{i≠j} w_i w_j k_ij over the weight of those pairs
        columns = [
            within[i] + within[j] - 2 * (applied[i] * weights[j]).sum(1) / (sizes[i] * sizes[j]) for i, j in pairs
        ]
        return np.stack(columns, axis=1)

    n = len(pooled) // 2
    mean = (kernel[:n, :n].sum() + kernel[n:, n:].sum()) / (2 * n * (n - 1))
    return Score(between, diagonal - float(mean), True)


def _sliced_score(pooled: np.ndarray, projections: int = 64, seed: int = 0, **_: int) -> Score:
    """d times the mean over directions of the squared one-dimensional W₂, so that a mean shift t counts ‖t‖² as in the
    other squared distances. W₂² = (difference of means)² + W₂² of the centred projections; the first, averaged over
    all directions, is ‖m_x − m_y‖²/d: only the second is left to chance. Groups must be of equal size."""
    width = pooled.shape[1]
    rows = torch.from_numpy(pooled)
    projected = (directions(width, projections, seed, rows).T @ rows.T).float().numpy()  # (projections, images)
    order = projected.argsort(axis=1)
    ranked = np.take_along_axis(projected, order, axis=1)

    def sort(counts: np.ndarray) -> np.ndarray:
        if counts.max() == 1:  # a plain subset: what is sorted stays sorted
            return ranked[counts.astype(bool)[order]].reshape(projections, -1)
        return np.sort(projected[:, np.repeat(np.arange(len(counts)), counts)], axis=1)

    def between(groups: Sequence[np.ndarray], pairs: Pairs) -> np.ndarray:
        means = [group @ pooled / group.sum(axis=1, keepdims=True) for group in groups]  # (draws, d)
        values = np.stack([((means[i] - means[j]) ** 2).sum(axis=1) for i, j in pairs], axis=1)
        for draw in range(len(values)):
            rows = [sort(group[draw]) for group in groups]
            rows = [row - row.mean(axis=1, keepdims=True) for row in rows]
            values[draw] += [width * np.square(rows[i] - rows[j]).mean(dtype=np.float64) for i, j in pairs]
        return values

    return Score(between, 1.0, False)


def _general_score(
    metric: Metric,
    function: Metric,
    options: dict[str, Any],
    pooled: np.ndarray,
    labels: np.ndarray,
) -> Score:
    """Call the metric on the rows of every pair of groups; one that takes `y_label` (otdd) gets the labels too."""
    data, classes = torch.from_numpy(pooled.astype(np.float32)), torch.from_numpy(labels)
    needs_labels = "y_label" in inspect.signature(function).parameters

    def call(x: torch.Tensor, y: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
        with torch.no_grad():
            result: Any = metric(x, left, y, right) if needs_labels else metric(x, y)
        return float(getattr(result, "value", result))

    def between(groups: Sequence[np.ndarray], pairs: Pairs) -> np.ndarray:
        values = np.empty((len(groups[0]), len(pairs)))
        for draw in range(len(values)):
            rows = [torch.from_numpy(np.repeat(np.arange(len(data)), group[draw])) for group in groups]
            values[draw] = [call(data[rows[i]], data[rows[j]], classes[rows[i]], classes[rows[j]]) for i, j in pairs]
        return values

    ignores_labels = not needs_labels or options.get("inner") == "none"  # otdd without its label term
    return Score(between, 1.0, False, exchangeable=ignores_labels)

"""Discrepancies between many groups of the same images, computed from what is common to all of them.

A group is a row of counts over the pooled images (how often each is in it), so that halves, permutations and bootstrap
resamples are one thing. MMD and energy distance use one kernel matrix for all groups, sliced Wasserstein one set of
projections. Features come to a metric centred and divided by √(½(tr Σ_S + tr Σ_T)), so every metric is free of scale; a
fixed `bandwidth` is in that unit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from orca_rank.distances._inputs import squared_distances
from orca_rank.distances.draws import Counts
from orca_rank.distances.mmd import MEDIAN_SAMPLES, energy_distance, mmd, resolve_bandwidth
from orca_rank.distances.sliced import sliced_wasserstein
from orca_rank.distances.sliced_score import SlicedScore

Pairs = Sequence[tuple[int, int]]
Metric = Callable[..., Any]  # (x (n, d), y (m, d)) -> number, or with labels (x, x_label, y, y_label)


@runtime_checkable
class Score(Protocol):
    """A metric between groups of the same images.

    scale: what a gap is divided by. unbiased: whether the metric is already about 0 under the null.
    exchangeable: whether images may change sides under the null. With labels they may not: the classes of the two sides
    have nothing to do with each other, so every permuted side would have classes of both.
    """

    scale: float
    unbiased: bool
    exchangeable: bool

    def between(self, groups: Sequence[Counts], pairs: Pairs) -> Float[np.ndarray, "draws pairs"]:
        """The metric between groups[i] and groups[j] for every (i, j), one column per pair."""

    def exchanged(self, sides: Bool[np.ndarray, "draws images"]) -> Float[np.ndarray, " draws"]:
        """The metric between the images marked in each row and all others."""


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
        return GeneralScore(metric, pooled, labels)
    return SlicedScore(pooled, **options) if function is sliced_wasserstein else KernelScore(function, options, pooled)


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


def reads_labels(metric: Metric) -> bool:
    """Whether what a metric says depends on classes: it takes `y_label`, and is not told to leave the labels out."""
    function, options = _unwrap(metric)
    return "y_label" in inspect.signature(function).parameters and options.get("inner") != "none"


def _unwrap(metric: Metric) -> tuple[Metric, dict[str, Any]]:
    """The function behind nested partials and their keyword options."""
    options: dict[str, Any] = {}
    inner: Any = metric
    while isinstance(inner, functools.partial):
        inner, options = inner.func, {**inner.keywords, **options}
    return inner, options


class KernelScore:
    """U-statistics mean k(x,x') + mean k(y,y') − 2 mean k(x,y), pairs of an image with itself left out.

    The scale is the spread of the feature space, k(x,x) − mean k(x,x'), averaged over the two sides.
    """

    unbiased, exchangeable = True, True

    def __init__(self, function: Metric, options: Mapping[str, Any], pooled: Float[np.ndarray, "images d"]) -> None:
        z, n = torch.from_numpy(pooled), len(pooled) // 2
        squared = squared_distances(z, z)
        diagonal = 0.0
        if function is mmd:
            count = int(options.get("kernels", 1))
            h = _bandwidth(z, squared, options.get("bandwidth", "median"))
            self.kernel = torch.zeros_like(squared)
            for i in range(count):
                self.kernel += torch.exp(-squared / (h * 2.0 ** (i - count // 2)))
            diagonal = float(count)
        else:
            self.kernel = -squared.sqrt()
        self.kernel.fill_diagonal_(0.0)
        mean = float(self.kernel[:n, :n].sum() + self.kernel[n:, n:].sum()) / (2 * n * (n - 1))
        self.scale = diagonal - mean

    def between(self, groups: Sequence[Counts], pairs: Pairs) -> Float[np.ndarray, "draws pairs"]:
        members = [torch.from_numpy(np.flatnonzero(group.any(axis=0))) for group in groups]
        weights = [torch.from_numpy(group.astype(float))[:, own] for group, own in zip(groups, members, strict=True)]
        sizes = [weight.sum(1) for weight in weights]

        def total(i: int, j: int) -> torch.Tensor:  # Σ w_i w_j k over the pairs of images
            return ((weights[i] @ self.kernel[members[i]][:, members[j]]) * weights[j]).sum(1)

        within = [
            total(i, i) / (size.square() - weight.square().sum(1))
            for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
        ]
        columns = [within[i] + within[j] - 2 * total(i, j) / (sizes[i] * sizes[j]) for i, j in pairs]
        return torch.stack(columns, 1).numpy()

    def exchanged(self, sides: Bool[np.ndarray, "draws images"]) -> Float[np.ndarray, " draws"]:
        x = torch.from_numpy(sides.astype(float))
        n, m = x.sum(1), sides.shape[1] - x.sum(1)
        applied = x @ self.kernel  # (draws, images)
        left = (applied * x).sum(1)
        across = applied.sum(1) - left
        right = self.kernel.sum() - 2 * across - left
        return (left / (n * (n - 1)) + right / (m * (m - 1)) - 2 * across / (n * m)).numpy()


class GeneralScore:
    """Calls the metric on the rows of every pair of groups; one that takes `y_label` (otdd) gets the labels too."""

    scale, unbiased = 1.0, False

    def __init__(
        self, metric: Metric, pooled: Float[np.ndarray, "images d"], labels: Int[np.ndarray, " images"]
    ) -> None:
        function, _ = _unwrap(metric)
        self.metric = metric
        self.data, self.classes = torch.from_numpy(pooled.astype(np.float32)), torch.from_numpy(labels)
        self.needs_labels = "y_label" in inspect.signature(function).parameters
        self.exchangeable = not reads_labels(metric)

    def between(self, groups: Sequence[Counts], pairs: Pairs) -> Float[np.ndarray, "draws pairs"]:
        values = np.empty((len(groups[0]), len(pairs)))
        for draw in range(len(values)):
            rows = [torch.from_numpy(np.repeat(np.arange(len(self.data)), group[draw])) for group in groups]
            values[draw] = [self._call(rows[i], rows[j]) for i, j in pairs]
        return values

    def exchanged(self, sides: Bool[np.ndarray, "draws images"]) -> Float[np.ndarray, " draws"]:
        return self.between([sides.astype(np.int64), (~sides).astype(np.int64)], [(0, 1)])[:, 0]

    @torch.no_grad()
    def _call(self, left: torch.Tensor, right: torch.Tensor) -> float:
        x, y = self.data[left], self.data[right]
        result: Any = (
            self.metric(x, self.classes[left], y, self.classes[right]) if self.needs_labels else self.metric(x, y)
        )
        return float(getattr(result, "value", result))


def _bandwidth(z: torch.Tensor, squared: torch.Tensor, bandwidth: Any) -> float:
    """`mmd.resolve_bandwidth`, the median from the distances at hand where that rule takes it over all images."""
    n = len(z) // 2
    if bandwidth == "median" and n <= MEDIAN_SAMPLES:
        above = squared.numpy()[np.triu(np.ones(squared.shape, dtype=bool), 1)]
        middle = (len(above) - 1) // 2
        if (median := float(np.partition(above, middle)[middle])) > 0:
            return median
    return resolve_bandwidth(z[:n], z[n:], bandwidth)

"""A labelled sample, the distances between its classes, and the cost of transporting it to another."""

from __future__ import annotations

import torch
from torch import Tensor

from orca_rank.distances._inputs import classes, squared_distances
from orca_rank.distances.exact import exact_class_distances
from orca_rank.distances.gaussian import GaussianClasses
from orca_rank.distances.sinkhorn import Plan

INNER = ("gaussian", "exact", "means", "none")


def check_inner(inner: str) -> None:
    """Raise ValueError for an inner distance that does not exist."""
    if inner not in INNER:
        raise ValueError(f"inner must be one of {', '.join(INNER)}, received {inner!r}")


class Labelled:
    """A labelled sample and the class statistics its inner distance needs."""

    def __init__(self, x: Tensor, label: Tensor | None, name: str, inner: str, ddof: int, detach: bool) -> None:
        if label is None and inner != "none":
            raise ValueError(f'{name} is None: give labels, or inner="none" for transport without labels')
        self.x, self.inner = x, inner
        self.index, counts = classes(None if inner == "none" else label, len(x), x.device)
        features = x.detach() if detach else x
        if inner == "gaussian":
            self.gaussian = GaussianClasses(features, self.index, counts, ddof)
        elif inner in ("exact", "means"):
            self.groups = features[self.index.argsort(stable=True)].split(counts.tolist())
        if inner == "means":
            self.means = torch.stack([group.mean(0) for group in self.groups])  # (K, d)

    def distances(self, other: Labelled) -> Tensor:
        """W between the classes of two samples, (K, L)."""
        if self.inner == "gaussian":
            return self.gaussian.distances(other.gaussian)
        if self.inner == "exact":
            return exact_class_distances(self.groups, other.groups)
        if self.inner == "means":
            return (self.means[:, None] - other.means[None]).square().sum(2)
        return self.x.new_zeros(1, 1)

    def own_distances(self) -> Tensor:
        """W between the classes of one sample, (K, K)."""
        if self.inner == "gaussian":
            return self.gaussian.own_distances()
        if self.inner == "exact":
            return exact_class_distances(self.groups, None)
        return self.distances(self)


def ground_cost(a: Labelled, b: Labelled, label_distances: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """‖x_i − y_j‖² + W(c_i, c_j) without a graph, up to terms that no plan changes, and what these add to the value.

    Both samples are moved to mean 0, which changes the cost by a constant and by functions of i or j alone; with
    equal weights these sum to ‖m_x − m_y‖². Far samples then cost no precision.
    """
    x, y = a.x.detach().to(dtype), b.x.detach().to(dtype)
    w = label_distances.detach().to(dtype)
    if a is b:
        offset = w.new_zeros(())
    else:
        means = x.mean(0), y.mean(0)
        offset = (means[0] - means[1]).square().sum() + w.min()
        x, y, w = x - means[0], y - means[1], w - w.min()
    cost = squared_distances(x, y)  # (n, m)
    if w.numel() > 1:
        rows = w[:, b.index]  # (K, m)
        for part, index in zip(cost.split(1024), a.index.split(1024), strict=True):
            part += rows[index]
    if a is b:
        cost.fill_diagonal_(0)
    return cost, offset


def class_mass(plan: Plan, a: Labelled, b: Labelled, shape: torch.Size) -> Tensor:
    """Transported mass between classes, ∂⟨P, C⟩/∂W, (K, L)."""
    columns = torch.zeros(len(b.index), shape[1], dtype=plan.f.dtype, device=plan.f.device)
    columns[torch.arange(len(b.index), device=columns.device), b.index] = 1
    return columns.new_zeros(shape).index_add_(0, a.index, plan.apply(columns))


def mean_cost(a: Labelled, label_distances: Tensor) -> float:
    """Mean cost within one sample, E‖x − x′‖² + E W(c, c′), in O(n d)."""
    x = a.x.detach().double()
    share = torch.bincount(a.index, minlength=len(label_distances)).double() / len(x)
    spread = 2 * (x - x.mean(0)).square().sum() / len(x)
    return float(spread + share @ label_distances.detach().double() @ share)

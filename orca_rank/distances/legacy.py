"""microsoft/otdd's numbers, as ORCA uses them: half costs, geomloss's annealing, stopped before convergence."""

from __future__ import annotations

import torch
from torch import Tensor

from orca_rank.distances._inputs import Envelope, squared_distances
from orca_rank.distances.labelled import Labelled
from orca_rank.distances.sinkhorn import annealed_divergence

INNER_EPSILON = 0.1


def _diameter(*samples: Tensor) -> float:
    """Length of the diagonal of the bounding box."""
    low = torch.stack([z.amin(0) for z in samples]).amin(0)
    high = torch.stack([z.amax(0) for z in samples]).amax(0)
    return float((high - low).norm())


def _class_distances(left: tuple[Tensor, ...], right: tuple[Tensor, ...] | None, debias: bool) -> Tensor:
    """Sinkhorn values of the FULL squared cost between classes, (K, L); zero diagonal within one sample."""
    others = left if right is None else right
    result = left[0].new_zeros(len(left), len(others))
    for i, a in enumerate(left):
        for j, b in enumerate(others):
            if right is None and j <= i:
                result[i, j] = result[j, i] if j < i else 0.0
                continue
            own = (squared_distances(a, a), squared_distances(b, b)) if debias else (None, None)
            result[i, j] = annealed_divergence(squared_distances(a, b), *own, INNER_EPSILON, _diameter(a, b))[0]
    return result


def legacy_otdd(
    a: Labelled, b: Labelled, epsilon: float, inner: str, debias: bool
) -> tuple[Tensor, float, int, Tensor]:
    """The legacy value of two labelled samples, differentiable as geomloss differentiates it, with the label term
    counted once.

    Args:
        a, b: the samples.
        epsilon: blur², in units of the half cost.

    Returns:
        value (half cost), marginal error, iterations, W between the samples.
    """
    if inner == "exact":
        with torch.no_grad():
            labels = [
                _class_distances(a.groups, b.groups, debias),
                _class_distances(a.groups, None, debias),
                _class_distances(b.groups, None, debias),
            ]
    else:
        labels = [a.distances(b), a.own_distances(), b.own_distances()]
    with torch.no_grad():
        x, y = a.x, b.x
        costs = [
            (squared_distances(z, w) + label[i][:, j]) / 2
            for (z, i), (w, j), label in (
                ((x, a.index), (y, b.index), labels[0]),
                ((x, a.index), (x, a.index), labels[1]),
                ((y, b.index), (y, b.index), labels[2]),
            )
        ]
        # The label index, numbered through both samples, is one more coordinate of the reference's point cloud.
        marked = [
            torch.cat([x, a.index[:, None].to(x)], 1),
            torch.cat([y, (b.index[:, None] + len(labels[1])).to(y)], 1),
        ]
        value, plans, iterations = annealed_divergence(*costs, epsilon, _diameter(*marked))
        forth, back, within_x, within_y = (plan / len(plan) for plan in plans)
        error = float((forth.sum(0) - 1 / len(y)).abs().sum() + (back.sum(0) - 1 / len(x)).abs().sum())
        gradients = [
            (x / len(x) - forth @ y) - (x / len(x) - within_x @ x),
            (y / len(y) - back @ x) - (y / len(y) - within_y @ y),
        ]
        one_hot = [torch.nn.functional.one_hot(s.index).to(x) for s in (a, b)]
        mean_plan = (forth + back.T) / 2
        gradients += [
            one_hot[0].T @ mean_plan @ one_hot[1] / 2,
            -one_hot[0].T @ within_x @ one_hot[0] / 2,
            -one_hot[1].T @ within_y @ one_hot[1] / 2,
        ]
    inputs = [a.x, b.x, *labels]
    return Envelope.apply(value, tuple(gradients), *inputs), error, iterations, labels[0].detach()

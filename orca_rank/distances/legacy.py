"""microsoft/otdd's numbers, as ORCA uses them: half costs, geomloss's annealing, stopped before convergence."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from orca_rank.distances._inputs import Envelope, full_precision, pair, squared_distances
from orca_rank.distances.labelled import Labelled, check_inner
from orca_rank.distances.otdd import OTDDResult

INNER_EPSILON = 0.1


@full_precision
def legacy_otdd(
    x: Float[Tensor, "n d"],
    x_label: Int[Tensor, " n"] | None,
    y: Float[Tensor, "m d"],
    y_label: Int[Tensor, " m"] | None,
    *,
    inner: str = "gaussian",
    epsilon: float = 0.1,
    inner_debias: bool = True,
    x_distances: Float[Tensor, "K K"] | None = None,
) -> OTDDResult:
    """OTDD² as microsoft/otdd (commit 72f1b22) and ORCA compute it: THEIR number, that of the HALF squared cost.

        ½ OTDD² ≈ S_ε( ½ ‖x − x′‖² + ½ W(c, c′) ),   debiased

    by geomloss's annealing: scaling 0.5, started at the diameter of the features with the label index appended, stopped
    when it reaches ε. It is differentiable as geomloss differentiates it, with the label term counted once. For a
    converged value of the full cost take `otdd`.

    Args:
        x: (n, d) and x_label: (n,) integers of any values; y: (m, d) and y_label: (m,).
        inner: "gaussian", "means" or "none" as in `otdd`; "exact" is a Sinkhorn value with ε = 0.1 and has no gradient.
        epsilon: blur², absolute, in units of the half cost.
        inner_debias: whether inner="exact" is debiased, as ORCA has it, or not, as is microsoft/otdd's default.
        x_distances: W between the classes of x where it is known, see `legacy_class_distances`.

    Returns:
        OTDDResult; its value and epsilon are of the half cost, its label distances W of the full one.

    Raises:
        ValueError: for bad shapes, widths, labels, options or values that are not finite.
    """
    check_inner(inner)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, received {epsilon}")
    x, y = pair(x, y)
    a, b = (Labelled(z, label, name, inner, 1, False)
            for z, label, name in ((x, x_label, "x_label"), (y, y_label, "y_label")))  # fmt: skip
    across, within_x, within_y = labels = _label_distances(a, b, inner, inner_debias, x_distances)
    with torch.no_grad():
        costs = [
            (squared_distances(p.x, q.x) + w[p.index][:, q.index]) / 2
            for p, q, w in ((a, b, across), (a, a, within_x), (b, b, within_y))
        ]
        # The label index, numbered through both samples, is one more coordinate of the reference's point cloud.
        marked = [
            torch.cat([x, a.index[:, None].to(x)], 1),
            torch.cat([y, (b.index[:, None] + len(within_x)).to(y)], 1),
        ]
        value, plans, iterations = _annealed(costs[0], (costs[1], costs[2]), epsilon, _diameter(*marked))
        forth, back, own_x, own_y = (plan / len(plan) for plan in plans)
        error = float((forth.sum(0) - 1 / len(y)).abs().sum() + (back.sum(0) - 1 / len(x)).abs().sum())
        one_hot = [torch.nn.functional.one_hot(s.index).to(x) for s in (a, b)]
        mean_plan = (forth + back.T) / 2
        gradients = (
            (x / len(x) - forth @ y) - (x / len(x) - own_x @ x),
            (y / len(y) - back @ x) - (y / len(y) - own_y @ y),
            one_hot[0].T @ mean_plan @ one_hot[1] / 2,
            -one_hot[0].T @ own_x @ one_hot[0] / 2,
            -one_hot[1].T @ own_y @ one_hot[1] / 2,
        )
    value = Envelope.apply(value, gradients, a.x, b.x, *labels)
    return OTDDResult(value, error, iterations, across.detach(), epsilon)


def legacy_class_distances(
    x: Float[Tensor, "n d"], label: Int[Tensor, " n"], *, inner_debias: bool = True
) -> Float[Tensor, "K K"]:
    """W between the classes of one sample as inner="exact" of `legacy_otdd` has it: what a fixed source keeps."""
    with torch.no_grad():
        return _class_distances(Labelled(x, label, "label", "exact", 1, False).groups, None, inner_debias)


def _label_distances(
    a: Labelled, b: Labelled, inner: str, debias: bool, known: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """W between the samples, (K, L), and within each."""
    if inner != "exact":
        return a.distances(b), a.own_distances() if known is None else known, b.own_distances()
    with torch.no_grad():
        return (
            _class_distances(a.groups, b.groups, debias),
            _class_distances(a.groups, None, debias) if known is None else known,
            _class_distances(b.groups, None, debias),
        )


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
            own = (squared_distances(a, a), squared_distances(b, b)) if debias else None
            result[i, j] = _annealed(squared_distances(a, b), own, INNER_EPSILON, _diameter(a, b))[0]
    return result


def _annealed(
    cross: Tensor, own: tuple[Tensor, Tensor] | None, epsilon: float, diameter: float
) -> tuple[Tensor, list[Tensor], int]:
    """geomloss's schedule: ε falls from diameter² by a factor 4 per averaged iteration, and stops at once when it
    reaches ε; nothing is run to convergence (Feydy 2020, algorithm 3.5; scaling 0.5).

    Args:
        cross: cost (n, m). own: (n, n) and (m, m), or None for the biased value. epsilon: blur².

    Returns:
        the value, the row-stochastic plans of (x→y, y→x, x→x, y→y), the iterations.
    """
    first = diameter**2 or epsilon
    steps = math.ceil(math.log(epsilon / first) / math.log(0.25)) if first > epsilon else 0
    schedule = [first, *(first * 0.25**k for k in range(steps)), epsilon]

    def soft(cost: Tensor, potential: Tensor, temperature: float) -> Tensor:
        logits = (potential - cost) / temperature
        return -temperature * (logits.logsumexp(1) - math.log(cost.shape[1]))

    both = [cross, cross.T, *(own or ())]
    across = [1, 0, 2, 3]  # whose potential each update reads
    potentials = [soft(cost, cost.new_zeros(cost.shape[1]), schedule[0]) for cost in both]
    for temperature in schedule:
        new = [soft(cost, potentials[across[k]], temperature) for k, cost in enumerate(both)]
        potentials = [(old + fresh) / 2 for old, fresh in zip(potentials, new, strict=True)]
    final = [soft(cost, potentials[across[k]], epsilon) for k, cost in enumerate(both)]
    plans = [((potentials[across[k]] - cost) / epsilon).softmax(1) for k, cost in enumerate(both)]
    value = final[0].mean() + final[1].mean()
    if len(final) == 4:
        value = value - final[2].mean() - final[3].mean()
    return value, plans, len(schedule) + 1

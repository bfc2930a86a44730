"""Optimal transport dataset distance (Alvarez-Melis & Fusi 2020, arXiv 2002.02923), squared, with exact gradients.

    OTDD² = OT( ‖x − x′‖² + W(c, c′) ),   W(c, c′) = W₂² between the features of class c and those of class c′

Units: the FULL squared cost above. geomloss and microsoft/otdd minimise half of it, so their numbers are half of
these; `schedule="legacy"` alone returns their (half-cost) numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from orca_rank.distances._inputs import Envelope, full_precision, pair, points
from orca_rank.distances.exact import exact_plan
from orca_rank.distances.labelled import INNER, Labelled, class_mass, ground_cost, mean_cost
from orca_rank.distances.legacy import legacy_otdd
from orca_rank.distances.sinkhorn import Plan, solve, solve_symmetric, working_dtype
from orca_rank.distances.sliced import sliced_with_labels

EPSILON = 5e-4  # relative to the mean cost within the samples


class OTDDResult(NamedTuple):
    """What `otdd` returns.

    Args:
        value: OTDD², differentiable. marginal_error: Σ|P1 − a| + Σ|Pᵀ1 − b| of the plan between the samples (0 where
            there is no such plan). iterations: kernel evaluations between the samples. label_distances: W (K, L).
        epsilon: the temperature used, in units of the full cost (of the half cost for schedule="legacy").
    """

    value: Float[Tensor, ""]
    marginal_error: float
    iterations: int
    label_distances: Float[Tensor, "K L"]
    epsilon: float


class _Own(NamedTuple):
    """½ OT_ε(α, α), its gradient in the features and in W."""

    value: Tensor
    features: Tensor | None
    labels: Tensor | None


def _own_term(a: Labelled, label_distances: Tensor, epsilon: float, tolerance: float, limit: int, grad: bool) -> _Own:
    dtype = working_dtype(len(a.x), len(a.x), a.x.dtype)
    plan = solve_symmetric(ground_cost(a, a, label_distances, dtype)[0], epsilon, tolerance, limit)
    if not grad:
        return _Own(plan.value / 2, None, None)
    x = a.x.detach().to(dtype)
    mass = (plan.apply(torch.ones_like(plan.f)) + plan.apply_transposed(torch.ones_like(plan.f))) / 2
    # ½ Σ P_ij ‖x_i − x_j‖² has the gradient 2 (mass ⊙ x − P x), P symmetric.
    features = 2 * (mass[:, None] * x - plan.apply(x))
    return _Own(plan.value / 2, features, class_mass(plan, a, a, label_distances.shape) / 2)


def _temperature(epsilon: float | None, units: str, scale: float, fallback: float) -> float:
    if units not in ("relative", "half_cost"):
        raise ValueError(f"epsilon_units must be 'relative' or 'half_cost', received {units!r}")
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon must be positive, received {epsilon}")
    if units == "half_cost":
        if epsilon is None:
            raise ValueError("epsilon_units='half_cost' needs an epsilon")
        return 2.0 * epsilon
    return (EPSILON if epsilon is None else epsilon) * (scale or fallback or 1.0)


class OTDDSource:
    """A prepared source: its self-term and class statistics are computed once and kept.

    In alignment the source never changes, and its self-term is the largest of the three. ε is relative to the source
    alone, so that it stays the same from step to step.

    Args:
        x: (n, d) features, not differentiated. label: (n,) integers, or None where inner="none".
        inner, epsilon, epsilon_units, tolerance, max_iterations, ddof: as in `otdd`; the outer problem is Sinkhorn.

    Raises:
        ValueError: as `otdd`.
    """

    @full_precision
    def __init__(
        self,
        x: Float[Tensor, "n d"],
        label: Int[Tensor, " n"] | None = None,
        *,
        inner: str = "gaussian",
        epsilon: float | None = None,
        epsilon_units: str = "relative",
        tolerance: float = 5e-4,
        max_iterations: int = 400,
        ddof: int = 1,
    ) -> None:
        _choice("inner", inner, INNER)
        x = points(x).detach()
        self.shift = x.mean(0)
        self.options = {"inner": inner, "ddof": ddof}
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.side = Labelled(x - self.shift, label, "label", inner, ddof, True)
        own = self.side.own_distances()
        self.epsilon = _temperature(epsilon, epsilon_units, mean_cost(self.side, own), 0.0)
        self.own = _own_term(self.side, own, self.epsilon, tolerance, max_iterations, False).value

    @full_precision
    def distance(
        self, y: Float[Tensor, "m d"], label: Int[Tensor, " m"] | None = None, *, detach_labels: bool = False
    ) -> OTDDResult:
        """OTDD² from the source to a labelled sample y (m, d), differentiable in y.

        Raises:
            ValueError: for bad shapes, labels or values that are not finite.
        """
        if y.shape[1] != self.shift.shape[0]:
            raise ValueError(f"y must have the source's width {self.shift.shape[0]}, received {tuple(y.shape)}")
        y = y.to(self.shift) - self.shift
        target = Labelled(y, label, "label", self.options["inner"], self.options["ddof"], detach_labels)
        return _sinkhorn(self.side, target, self.epsilon, self.tolerance, self.max_iterations, self.own)


def _sinkhorn(
    a: Labelled,
    b: Labelled,
    epsilon: float,
    tolerance: float,
    limit: int,
    own: Tensor | None,
    labels: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> OTDDResult:
    """The debiased value OT(a, b) − ½ OT(a, a) − ½ OT(b, b); `own` is ½ OT(a, a) where it is known."""
    across, within_a, within_b = labels or (a.distances(b), None, b.own_distances())
    inputs = [t for t in (a.x, b.x, across, within_a, within_b) if t is not None]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    with torch.no_grad():
        dtype = working_dtype(len(a.x), len(b.x), a.x.dtype)
        cost, offset = ground_cost(a, b, across, dtype)
        plan = solve(cost, epsilon, tolerance, limit)
        value, gradients = plan.value.double() + offset.double(), []
        if grad:
            x, y, ones_a, ones_b = a.x.to(dtype), b.x.to(dtype), torch.ones_like(plan.f), torch.ones_like(plan.g)
            gradients = [
                2 * (plan.apply(ones_b)[:, None] * x - plan.apply(y)),
                2 * (plan.apply_transposed(ones_a)[:, None] * y - plan.apply_transposed(x)),
                class_mass(plan, a, b, across.shape),
            ]
        error, iterations = plan.error, plan.iterations
        del plan, cost
        for position, side, within in ((0, a, within_a), (1, b, within_b)):
            if position == 0 and own is not None:
                value = value - own.double()
                continue
            term = _own_term(side, within, epsilon, tolerance, limit, grad)
            value = value - term.value.double()
            if grad:
                gradients[position] = gradients[position] - term.features.to(dtype)
                gradients.append(-term.labels)
    if grad:
        value = Envelope.apply(
            value.to(a.x.dtype), tuple(g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)), *inputs
        )
    return OTDDResult(value.to(a.x.dtype), error, iterations, across.detach(), epsilon)


def _linear_programme(a: Labelled, b: Labelled) -> OTDDResult:
    across = a.distances(b)
    with torch.no_grad():
        cost, offset = ground_cost(a, b, across, torch.float64)
        p = exact_plan(cost)
        value = (p * cost).sum() + offset
        plan = Plan(p.sum(1), p.sum(0), p, torch.ones_like(p[:, 0]), 0.0, 0)
        x, y = a.x.double(), b.x.double()
        gradients = (
            2 * (plan.f[:, None] * x - p @ y),
            2 * (plan.g[:, None] * y - p.T @ x),
            class_mass(plan, a, b, across.shape),
        )
        error = float((plan.f - 1 / len(x)).abs().sum() + (plan.g - 1 / len(y)).abs().sum())
    dtype = a.x.dtype
    value = Envelope.apply(value.to(dtype), tuple(g.to(dtype) for g in gradients), a.x, b.x, across)
    return OTDDResult(value, error, 0, across.detach(), 0.0)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, received {value!r}")


@full_precision
def otdd(
    x: Float[Tensor, "n d"],
    x_label: Int[Tensor, " n"] | None,
    y: Float[Tensor, "m d"],
    y_label: Int[Tensor, " m"] | None,
    *,
    inner: str = "gaussian",
    outer: str = "sinkhorn",
    epsilon: float | None = None,
    epsilon_units: str = "relative",
    schedule: str = "converged",
    detach_labels: bool = False,
    tolerance: float = 5e-4,
    max_iterations: int = 400,
    ddof: int = 1,
    projections: int = 64,
    seed: int = 0,
    inner_debias: bool = True,
) -> OTDDResult:
    """Squared optimal transport dataset distance.

        OTDD² = min_P Σ P_ij ( ‖x_i − y_j‖² + W(c_i, c_j) )        full squared cost, not half

    outer="sinkhorn" (the default) is the debiased Sinkhorn divergence S_ε = OT_ε(x, y) − ½ OT_ε(x, x) − ½ OT_ε(y, y)
    of that cost, run to `tolerance`: 0 for identical samples, and for small ε close to the linear programme in value
    and gradient. outer="exact" is the linear programme itself (not debiased; up to about 5,000 points).
    outer="sliced" embeds W in Euclidean coordinates (classical scaling) beside the features and averages
    one-dimensional transport over random directions, times their dimension, so that a translation by t still gives
    about 2 ‖t‖²; up to the choice of directions it is a lower bound. It is meant for 10⁵ samples and more.

    Args:
        x: (n, d) and x_label: (n,) integers of any values; y: (m, d) and y_label: (m,). float16, bfloat16 and float32
            are computed in float32 or better, float64 in float64. Labels may be None where inner="none".
        inner: W between classes: "gaussian" (Bures-Wasserstein of the class Gaussians), "exact" (linear programme
            between the classes' samples), "means" (‖m_c − m_c′‖²) or "none" (no label term).
        outer: "sinkhorn", "exact" or "sliced".
        epsilon: entropic temperature, a constant in the gradient. By default 5e-4 with units "relative": a multiple of
            the mean full cost within the two samples, E‖x − x′‖² + E W, averaged over both. With
            epsilon_units="half_cost" it is the absolute blur² of geomloss and microsoft/otdd, whose cost is half of
            this one; the value stays the full one.
        schedule: "converged", or "legacy" (with outer="sinkhorn"): geomloss's annealing as microsoft/otdd and ORCA
            call it: scaling 0.5, not converged, started at the diameter of the features with the label index
            appended, epsilon (default 0.1) absolute in the units of the HALF cost. `.value` is then THEIR number, that
            of the half cost. Its "exact" inner distances are Sinkhorn values with ε = 0.1, debiased as ORCA has them
            (inner_debias=False as microsoft/otdd's default), and carry no gradient.
        detach_labels: True treats W as constant in the gradient.
        tolerance: largest Σ|P1 − a| + Σ|Pᵀ1 − b|. max_iterations: bound on kernel evaluations at the last ε.
        ddof: class covariances over n_c − ddof; 1 (unbiased) is the convention of the reference implementation.
        projections, seed: of outer="sliced".

    Returns:
        OTDDResult(value, marginal_error, iterations, label_distances, epsilon).

    Raises:
        ValueError: for bad shapes, widths, labels, options or values that are not finite.
    """
    _choice("inner", inner, INNER)
    _choice("outer", outer, ("sinkhorn", "exact", "sliced"))
    _choice("schedule", schedule, ("converged", "legacy"))
    x, y = pair(x, y)
    a = Labelled(x, x_label, "x_label", inner, ddof, detach_labels)
    b = Labelled(y, y_label, "y_label", inner, ddof, detach_labels)
    if schedule == "legacy":
        if outer != "sinkhorn":
            raise ValueError(f"schedule='legacy' needs outer='sinkhorn', received {outer!r}")
        temperature = _temperature(0.1 if epsilon is None else epsilon, "half_cost", 0.0, 0.0) / 2
        value, error, iterations, across = legacy_otdd(a, b, temperature, inner, inner_debias)
        return OTDDResult(value, error, iterations, across, temperature)
    if outer == "exact":
        return _linear_programme(a, b)
    across, within_a, within_b = a.distances(b), a.own_distances(), b.own_distances()
    if outer == "sliced":
        blocks = torch.cat([torch.cat([within_a, across], 1), torch.cat([across.T, within_b], 1)])
        value = sliced_with_labels(x, a.index, y, b.index, blocks, projections, seed)
        return OTDDResult(value, 0.0, 0, across.detach(), 0.0)
    scale = (mean_cost(a, within_a) + mean_cost(b, within_b)) / 2
    fallback = float((x.detach().mean(0) - y.detach().mean(0)).square().sum() + across.detach().mean())
    temperature = _temperature(epsilon, epsilon_units, scale, fallback)
    return _sinkhorn(a, b, temperature, tolerance, max_iterations, None, (across, within_a, within_b))

"""The outer problem of OTDD: the linear programme, or one entropic term, with gradients by the envelope theorem."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from orca_rank.distances._inputs import Envelope
from orca_rank.distances.exact import exact_plan
from orca_rank.distances.labelled import Labelled, class_mass, ground_cost
from orca_rank.distances.sinkhorn import Plan, solve, solve_symmetric, working_dtype

ITERATIONS = 400  # most evaluations of the kernel at the last temperature


class Term(NamedTuple):
    """Transport between two labelled samples.

    Args:
        value: of the full squared cost, float64, differentiable in the features and the label distances.
        error: Σ|P1 − a| + Σ|Pᵀ1 − b| of the plan. iterations: evaluations of the kernel.
    """

    value: Tensor
    error: float
    iterations: int


def linear_programme(a: Labelled, b: Labelled, w: Tensor) -> Term:
    """min_P Σ P_ij (‖x_i − y_j‖² + W(c_i, c_j)); w: label distances (K, L)."""
    with torch.no_grad():
        cost, offset = ground_cost(a, b, w, torch.float64)
        p = exact_plan(cost)
        plan = Plan(p.sum(1), p.sum(0), p, torch.ones_like(p[:, 0]), 0.0, 0)
        error = float((plan.f - 1 / len(a.x)).abs().sum() + (plan.g - 1 / len(b.x)).abs().sum())
        value, gradients = (p * cost).sum() + offset, _gradients(plan, a, b, w)
    return Term(Envelope.apply(value, gradients, a.x, b.x, w), error, 0)


def entropic(a: Labelled, b: Labelled, w: Tensor, epsilon: float, tolerance: float) -> Term:
    """OT_ε = min_P Σ P_ij (‖x_i − y_j‖² + W(c_i, c_j)) + ε KL(P | uniform); a sample with itself where b is a.

    Args:
        w: label distances (K, L). epsilon: in units of the cost. tolerance: of the marginal error.
    """
    inputs = (a.x, b.x, w)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    with torch.no_grad():
        cost, offset = ground_cost(a, b, w, working_dtype(len(a.x), len(b.x), a.x.dtype))
        solver = solve_symmetric if a is b else solve
        plan = solver(cost, epsilon, tolerance, ITERATIONS)
        value = plan.value.double() + offset.double()
        gradients = _gradients(plan, a, b, w) if grad else None
    if gradients is not None:
        value = Envelope.apply(value, gradients, *inputs)
    return Term(value, plan.error, plan.iterations)


def _gradients(plan: Plan, a: Labelled, b: Labelled, w: Tensor) -> tuple[Tensor, ...]:
    """Of ⟨P, C⟩ with P fixed: 2 (P1 ⊙ x − P y), 2 (Pᵀ1 ⊙ y − Pᵀx) and the mass between classes."""
    x, y = a.x.to(plan.kernel), b.x.to(plan.kernel)
    ones_a, ones_b = torch.ones_like(x[:, 0]), torch.ones_like(y[:, 0])
    gradients = (
        2 * (plan.apply(ones_b)[:, None] * x - plan.apply(y)),
        2 * (plan.apply_transposed(ones_a)[:, None] * y - plan.apply_transposed(x)),
        class_mass(plan, a, b, w.shape),
    )
    return tuple(gradient.to(t.dtype) for gradient, t in zip(gradients, (a.x, b.x, w), strict=True))

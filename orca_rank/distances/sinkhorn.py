"""Entropic optimal transport between uniform measures, with a dense cost, run to a stated marginal error.

    OT_ε(C) = min_P ⟨P, C⟩ + ε KL(P | a ⊗ b),   P 1 = a = 1/n,  Pᵀ 1 = b = 1/m
            = max_{f,g} ⟨a, f⟩ + ⟨b, g⟩ at the optimum  (Feydy, Geometric data analysis, 2020, eq. 3.187)

ε is annealed; at every ε a few Sinkhorn scalings (Cuturi 2013) come before truncated Newton steps on the semi-dual
g ↦ ⟨a, f(g)⟩ + ⟨b, g⟩, whose Hessian −(diag(c) − n PᵀP)/ε is only ever applied to vectors (conjugate gradients).
The scalings and the Hessian are matrix-vector products: one exponential of the cost serves a whole step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 2**18  # problems of up to 512 x 512 are solved in float64
# exp(-40) = 4e-18 of a row's largest entry is nothing, and it and its square stay clear of denormal numbers, which
# make exponentials and matrix-vector products tens of times slower on a CPU.
FLOOR = -40.0
DIRECT = 48  # up to so many columns a Newton system is factored; the same time at 64, slower above


class Plan(NamedTuple):
    """An entropic plan P_ij = rows_i · kernel_ij and its potentials.

    Args:
        f, g: dual potentials (n,), (m,). kernel: (n, m). rows: (n,). error: Σ|P1 − a| + Σ|Pᵀ1 − b|.
        iterations: evaluations of the kernel.
    """

    f: Tensor
    g: Tensor
    kernel: Tensor
    rows: Tensor
    error: float
    iterations: int

    @property
    def value(self) -> Tensor:
        return self.f.mean() + self.g.mean()

    def apply(self, v: Tensor) -> Tensor:
        """P v, (m, ...) -> (n, ...)."""
        return self.rows.view(-1, *[1] * (v.ndim - 1)) * (self.kernel @ v)

    def apply_transposed(self, u: Tensor) -> Tensor:
        """Pᵀ u, (n, ...) -> (m, ...)."""
        return self.kernel.T @ (self.rows.view(-1, *[1] * (u.ndim - 1)) * u)


def working_dtype(n: int, m: int, dtype: torch.dtype) -> torch.dtype:
    """float64 for small problems, where it costs nothing that matters."""
    return torch.float64 if n * m <= SMALL else dtype


def anneal(spread: float, epsilon: float, factor: float = 8.0) -> list[float]:
    """Decreasing temperatures that end at ε."""
    levels = max(0, math.ceil(math.log(max(spread / 32, epsilon) / epsilon) / math.log(factor)))
    return [epsilon * factor**level for level in range(levels, -1, -1)]


class _Problem:
    """Holds the cost and one work matrix of its size; `set(g, ε)` makes the rows exact."""

    def __init__(self, cost: Tensor) -> None:
        self.cost, self.kernel = cost, torch.empty_like(cost)
        self.n, self.m = cost.shape
        self.evaluations = 0

    def set(self, g: Tensor, epsilon: float) -> None:
        """f = softmin of C − g, kernel and row scaling such that P 1 = a exactly."""
        torch.sub(g, self.cost, out=self.kernel).mul_(1 / epsilon)
        top = self.kernel.amax(1, keepdim=True)
        total = self.kernel.sub_(top).clamp_(min=FLOOR).exp_().sum(1)
        self.g, self.epsilon = g, epsilon
        self.f = -epsilon * ((total / self.m).log() + top[:, 0])
        self.rows = 1 / (self.n * total)
        self.columns = self.kernel.T @ self.rows
        self.residual = 1 / self.m - self.columns
        self.error = float(self.residual.abs().sum())
        self.dual = float(self.f.mean(dtype=torch.float64) + self.g.mean(dtype=torch.float64))
        self.evaluations += 1

    def scalings(self, count: int) -> Tensor:
        """log v after `count` Sinkhorn scalings of the present plan."""
        u = self.rows
        tiny = torch.finfo(u.dtype).tiny
        for _ in range(count):
            v = 1 / (self.m * (self.kernel.T @ u)).clamp_min(tiny)
            u = 1 / (self.n * (self.kernel @ v)).clamp_min(tiny)
        return v.log()

    def newton_direction(self, limit: int, bound: float) -> Tensor:
        """Approximate solution of (diag(c) − n PᵀP) δ = b − c, of mean 0: the matrix is formed and factored where it
        is small, else only applied to vectors."""
        if self.m <= DIRECT:
            plan = (self.n**0.5 * self.rows)[:, None] * self.kernel  # √n P
            # The ridge stands for the direction of constants, along which nothing changes.
            hessian = ((1 + 1e-4) * self.columns + 1e-6 / self.m).diag().sub_(plan.T @ plan).double()
            factor, failed = torch.linalg.cholesky_ex(hessian)
            if not int(failed):
                step = torch.cholesky_solve(self.residual.double()[:, None], factor)[:, 0]
                return (step - step.mean()).to(self.residual)
        return self._conjugate_gradients(limit, bound)

    def _conjugate_gradients(self, limit: int, bound: float) -> Tensor:
        squares = torch.zeros_like(self.columns)
        for kernel, rows in zip(self.kernel.split(512), self.rows.split(512), strict=True):
            squares.addmv_(kernel.square().T, (self.n * rows).square())
        diagonal = torch.maximum(self.columns - squares / self.n, 1e-3 * self.columns + 1e-6 / self.m)
        residual, solution = self.residual.clone(), torch.zeros_like(self.residual)
        goal = min(0.1, self.error) * residual.norm()
        scaled = residual / diagonal
        direction, product = scaled.clone(), residual @ scaled
        weights = self.n * self.rows.square()
        for _ in range(limit):
            image = (self.columns + 1e-8 / self.m) * direction
            image -= self.kernel.T @ (weights * (self.kernel @ direction))
            curvature = direction @ image
            if curvature <= 0:
                break
            solution += product / curvature * direction
            residual -= product / curvature * image
            if residual.norm() < goal or solution.abs().max() > bound:
                break
            scaled = residual / diagonal
            previous, product = product, residual @ scaled
            direction = scaled + product / previous * direction
        return solution - solution.mean()


def solve(cost: Tensor, epsilon: float, tolerance: float, max_iterations: int) -> Plan:
    """The entropic plan of a cost matrix.

    Args:
        cost: (n, m). epsilon: temperature, in the units of the cost. tolerance: largest marginal error.
        max_iterations: most evaluations of the kernel at the last temperature.
    """
    problem = _Problem(cost)
    g = cost.new_zeros(cost.shape[1])
    levels = anneal(float(cost.max() - cost.min()), epsilon)
    for level, temperature in enumerate(levels):
        last = level == len(levels) - 1
        g = _descend(problem, g, temperature, tolerance if last else 5e-2, max_iterations if last else 14)
    return Plan(problem.f, problem.g, problem.kernel, problem.rows, problem.error, problem.evaluations)


def _descend(problem: _Problem, g: Tensor, epsilon: float, tolerance: float, limit: int) -> Tensor:
    """Sinkhorn scalings, then Newton steps within a trust region of 4 ε; scalings again where a step fails."""
    problem.set(g, epsilon)
    end = problem.evaluations + limit
    scale, failures, stalled, best = True, 0, 0, math.inf
    while problem.evaluations < end and failures < 3 and stalled < 8:
        # Potentials of limited precision cannot do better than this.
        floor = 0.25 * torch.finfo(g.dtype).eps * float(problem.g.abs().max()) / epsilon
        if problem.error <= max(tolerance, floor):
            break
        stalled = 0 if problem.error < 0.9 * best or problem.error > 1e-2 else stalled + 1
        best = min(best, problem.error)
        if scale:
            problem.set(problem.g + epsilon * problem.scalings(10), epsilon)
            scale = False
            continue
        step = problem.newton_direction(limit=100, bound=40.0)
        # Far from the solution a few columns ask for huge steps: clip them. Near it, keep the direction.
        if problem.error > 1e-2:
            step, size = step.clamp(-4.0, 4.0), 1.0
        else:
            size = min(1.0, 4.0 / max(float(step.abs().max()), 1e-30))
        base, dual, slope = problem.g, problem.dual, epsilon * float(problem.residual @ step)
        scale = True
        for _ in range(3):
            problem.set(base + epsilon * size * step, epsilon)
            if problem.dual >= dual + 0.1 * size * slope - 4 * torch.finfo(g.dtype).eps * abs(dual):
                scale, failures = False, 0
                break
            size /= 4
        if scale:
            failures += 1
            problem.set(base, epsilon)
    return problem.g


def solve_symmetric(cost: Tensor, epsilon: float, tolerance: float, max_iterations: int) -> Plan:
    """The plan of a symmetric cost with zero diagonal, f = g, by averaged scalings u ← √(u / (n K u)).

    K = exp(−C/ε) has a unit diagonal, so nothing underflows and no annealing is needed.
    """
    n = cost.shape[0]
    kernel = torch.mul(cost, -1 / epsilon).clamp_(min=FLOOR).exp_()
    u = kernel.mean(1).rsqrt()  # a first guess that is right where the kernel is constant
    goal = max(tolerance / 2, 4 * torch.finfo(u.dtype).eps)
    image = kernel @ u
    iterations = 1
    while (error := float((u * image / n - 1).abs().mean())) > goal and iterations < max_iterations:
        u = (n * u / image).sqrt()
        image = kernel @ u
        iterations += 1
    f = epsilon * u.log()
    # P_ij = u_i K_ij u_j / n²: u_j is folded into the kernel's columns.
    return Plan(f, f, kernel.mul_(u), u / n**2, 2 * error, iterations)

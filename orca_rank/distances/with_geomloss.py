"""The entropic terms of OTDD by geomloss (Feydy et al., AISTATS 2019), whose online backend never holds a cost matrix.

geomloss takes points, and half the squared distance between them as their cost; everything else becomes coordinates:

    x_i = (x_i, u_i),  y_j = (y_j, v_j),   C_ij = ½ ‖x_i − y_j‖² + ¼ ⟨u_i, v_j⟩
    u_i = (w_c, e_c, −4 f_i, 1),  v_j = (e_c′, w_c′, 1, −4 g_j)   =>   C_ij = ½ (‖x_i − y_j‖² + W_cc′) − f_i − g_j

with e the unit vectors, w the rows and columns of W, and potentials f, g. The annealing of `SamplesLoss` ends as soon
as ε is reached; its gradient is then 5 to 70 % off at the default ε of `otdd`. So it is called again, at ε, on the cost
less the potentials of the call before, until the marginal error is small.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from orca_rank.distances._inputs import squared_distances
from orca_rank.distances.labelled import Labelled
from orca_rank.distances.outer import Term
from orca_rank.distances.sinkhorn import working_dtype

DENSE = 5000**2  # pairs up to which "geomloss" holds the cost matrix
SCALING = 0.8  # of √ε from one annealed iteration to the next
STEPS, ROUNDS = 50, 40  # iterations at ε between looks at the marginal error; most such rounds

Cost = Callable[[Tensor, Tensor], Tensor] | str


def geomloss_term(
    a: Labelled, b: Labelled, w: Tensor, epsilon: float, tolerance: float, online: bool | None = None
) -> Term:
    """OT_ε of the full squared cost, differentiable in the features and the label distances; see `outer.entropic`.

    Args:
        w: label distances (K, L). epsilon: in units of the full cost. tolerance: of the marginal error.
        online: True for geomloss's online backend, None for it where the cost matrix has more than DENSE entries.

    Raises:
        ImportError: if the online backend is called for and KeOps is not installed.
    """
    if online is None:
        online = len(a.x) * len(b.x) > DENSE
    if online and importlib.util.find_spec("pykeops") is None:
        raise ImportError(
            f"geomloss needs KeOps for {len(a.x)} x {len(b.x)} samples without a cost matrix, and pykeops is not "
            f"installed: pip install pykeops (it compiles with a C++ compiler or CUDA), or take outer='sliced', "
            f"which is made for so many samples"
        )
    with torch.set_grad_enabled(torch.is_grad_enabled()):  # geomloss leaves gradients on
        return _solve(_Points(a, b, w, online), epsilon / 2, tolerance)


class _Points:
    """Two samples as geomloss's points; potentials change two of their coordinates."""

    def __init__(self, a: Labelled, b: Labelled, w: Tensor, online: bool) -> None:
        dtype, grad = working_dtype(len(a.x), len(b.x), a.x.dtype), torch.is_grad_enabled()
        x, y, w = (t.to(dtype) if grad else t.detach().to(dtype) for t in (a.x, b.x, w))
        self.offset = w.new_zeros((), dtype=torch.float64)
        if a is not b:  # the same plan, and less to round: see `ground_cost`
            means, least = (x.mean(0), y.mean(0)), w.detach().min()
            self.offset = self.offset + (means[0] - means[1]).square().sum() + least
            x, y, w = x - means[0], y - means[1], w - least
        first, second = (torch.eye(size, dtype=dtype, device=w.device) for size in w.shape)
        self.x = torch.cat([x, w[a.index], first[a.index]], 1)  # (n, d + L + K)
        self.y = torch.cat([y, second[b.index], w.T[b.index]], 1)
        self.width, self.online = x.shape[1], online
        radius = [float(z.detach().norm(dim=1).max()) for z in (x, y)]
        self.largest = (sum(radius) ** 2 + float(w.detach().max())) / 2  # a bound on the half cost
        self.symmetric = a is b

    def call(
        self, f: Tensor, g: Tensor, blur: float, first: float, scaling: float, potentials: bool = False
    ) -> tuple[Tensor, ...]:
        """SamplesLoss on the cost less f and g, annealed from √ε = first to blur: its value, or its potentials."""
        from geomloss import SamplesLoss

        loss = SamplesLoss(
            "sinkhorn", p=2, blur=blur, diameter=first, scaling=scaling, debias=False, potentials=potentials,
            cost=self._formula() if self.online else self._matrix, backend="online" if self.online else "tensorized",
        )  # fmt: skip
        one = torch.ones_like(f)[:, None], torch.ones_like(g)[:, None]
        x = torch.cat([self.x, -4 * f[:, None], one[0]], 1)
        y = torch.cat([self.y, one[1], -4 * g[:, None]], 1)
        if not potentials:
            return (loss(x, y),)
        return tuple(potential.flatten() for potential in loss(x.detach(), y.detach()))

    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """(1, n, D), (1, m, D) -> (1, n, m)."""
        d = self.width
        return (squared_distances(x[0, :, :d], y[0, :, :d]) / 2 + x[0, :, d:] @ y[0, :, d:].T / 4)[None]

    def _formula(self) -> str:
        """The same for KeOps."""
        d, rest = self.width, self.x.shape[1] + 2 - self.width
        features, others = (f"Extract({{}},{start},{size})" for start, size in ((0, d), (d, rest)))
        return (
            f"(SqDist({features.format('X')},{features.format('Y')})/IntCst(2)"
            f"+({others.format('X')}|{others.format('Y')})/IntCst(4))"
        )


def _solve(points: _Points, epsilon: float, tolerance: float) -> Term:
    """Half-cost potentials run to the tolerance, then one call for the value and its gradient."""
    blur = epsilon**0.5
    f, g = points.x.new_zeros(len(points.x)), points.y.new_zeros(len(points.y))
    if not points.symmetric and points.largest > epsilon:  # a symmetric kernel has a unit diagonal: nothing underflows
        f, g = points.call(f, g, blur, points.largest**0.5, SCALING, potentials=True)
    near = 1 + 1e-6  # a schedule of STEPS temperatures that are all ε
    error, iterations = _error(points, f, g, blur), 0
    floor = 4 * torch.finfo(f.dtype).eps * max(1.0, float(f.abs().max() + g.abs().max()) / epsilon)
    while error > max(tolerance, floor) and iterations < STEPS * ROUNDS:
        step = points.call(f, g, blur, near * blur, near ** (-1 / STEPS), potentials=True)
        f, g = f + step[0], g + step[1]
        error = _error(points, f, g, blur)
        iterations += STEPS
    (value,) = points.call(f, g, blur, blur, SCALING)
    known = f.mean(dtype=torch.float64) + g.mean(dtype=torch.float64)
    return Term(2 * (value.double() + known) + points.offset, error, iterations)


def _error(points: _Points, f: Tensor, g: Tensor, blur: float) -> float:
    """Marginal error of potentials, from how far the shortest call of geomloss moves them."""
    moved = points.call(f, g, blur, blur, SCALING, potentials=True)
    gauge = (moved[0].mean() - moved[1].mean()) / 2  # f + c, g − c are the same potentials
    return sum(float((step / blur**2).expm1().abs().mean()) for step in (moved[0] - gauge, moved[1] + gauge))

"""Optimal transport dataset distance (Alvarez-Melis & Fusi 2020, arXiv 2002.02923), squared, with exact gradients.

    OTDD² = OT( ‖x − x′‖² + W(c, c′) ),   W(c, c′) = W₂² between the features of class c and those of class c′

Units: the FULL squared cost above. geomloss and microsoft/otdd minimise half of it, so their numbers are half of these;
`legacy_otdd` returns theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from orca_rank.distances._inputs import full_precision, pair, points
from orca_rank.distances.labelled import Labelled, check_inner, mean_cost
from orca_rank.distances.outer import Term, entropic, linear_programme
from orca_rank.distances.sliced import sliced_with_labels

EPSILON = 5e-4  # relative to the mean cost within the samples
OUTER = ("sinkhorn", "exact", "sliced")
BACKENDS = ("native", "geomloss", "geomloss_online")


class OTDDResult(NamedTuple):
    """What `otdd` returns.

    Args:
        value: OTDD², differentiable. marginal_error: Σ|P1 − a| + Σ|Pᵀ1 − b| of the plan between the samples (0 where
            there is no such plan). iterations: kernel evaluations between the samples (geomloss: at the last ε).
        label_distances: W (K, L). epsilon: the temperature used, in units of the full cost.
    """

    value: Float[Tensor, ""]
    marginal_error: float
    iterations: int
    label_distances: Float[Tensor, "K L"]
    epsilon: float


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
        inner, epsilon, epsilon_units, backend, tolerance, ddof: as in `otdd`; the outer problem is Sinkhorn.

    Raises:
        ValueError, ImportError: as `otdd`.
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
        backend: str = "native",
        tolerance: float = 5e-4,
        ddof: int = 1,
    ) -> None:
        _check(inner, "sinkhorn", backend)
        x = points(x).detach()
        self.shift = x.mean(0)
        self.inner, self.ddof, self.backend, self.tolerance = inner, ddof, backend, tolerance
        self.side = Labelled(x - self.shift, label, "label", inner, ddof, True)
        own = self.side.own_distances()
        self.epsilon = _temperature(epsilon, epsilon_units, mean_cost(self.side, own), 0.0)
        self.own = _term(self.side, self.side, own, self.epsilon, tolerance, backend).value

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
        target = Labelled(y, label, "label", self.inner, self.ddof, detach_labels)
        across = self.side.distances(target)
        options = self.epsilon, self.tolerance, self.backend
        term = _term(self.side, target, across, *options)
        own = _term(target, target, target.own_distances(), *options).value
        value = term.value - self.own / 2 - own / 2
        return OTDDResult(value.to(y.dtype), term.error, term.iterations, across.detach(), self.epsilon)


def _term(a: Labelled, b: Labelled, w: Tensor, epsilon: float, tolerance: float, backend: str) -> Term:
    """OT_ε between two samples, or of one with itself, by the chosen backend."""
    if backend == "native":
        return entropic(a, b, w, epsilon, tolerance)
    from orca_rank.distances.with_geomloss import geomloss_term

    return geomloss_term(a, b, w, epsilon, tolerance, online=True if backend == "geomloss_online" else None)


def _check(inner: str, outer: str, backend: str) -> None:
    check_inner(inner)
    if outer not in OUTER:
        raise ValueError(f"outer must be one of {', '.join(OUTER)}, received {outer!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, received {backend!r}")
    if outer != "sinkhorn" and backend != "native":
        raise ValueError(f"backend={backend!r} solves outer='sinkhorn' only, received outer={outer!r}")


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
    backend: str = "native",
    detach_labels: bool = False,
    tolerance: float = 5e-4,
    ddof: int = 1,
    projections: int = 64,
    seed: int = 0,
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
        backend: who solves outer="sinkhorn": "native", by Newton steps with a dense cost; "geomloss" (see
            `with_geomloss`), which gives the same value and gradient within the tolerance, and above 5,000 × 5,000
            samples holds no cost matrix (its online backend, for a GPU; needs pykeops); "geomloss_online" holds none
            for fewer either.
        detach_labels: True treats W as constant in the gradient.
        tolerance: largest Σ|P1 − a| + Σ|Pᵀ1 − b|, unless rounding or the bound on iterations ends before.
        ddof: class covariances over n_c − ddof; 1 (unbiased) is the convention of the reference implementation.
        projections, seed: of outer="sliced".

    Returns:
        OTDDResult(value, marginal_error, iterations, label_distances, epsilon).

    Raises:
        ValueError: for bad shapes, widths, labels, options or values that are not finite.
        ImportError: if the backend needs KeOps and it is not installed.
    """
    _check(inner, outer, backend)
    x, y = pair(x, y)
    a = Labelled(x, x_label, "x_label", inner, ddof, detach_labels)
    b = Labelled(y, y_label, "y_label", inner, ddof, detach_labels)
    across = a.distances(b)
    if outer == "exact":
        term = linear_programme(a, b, across)
        return OTDDResult(term.value.to(x.dtype), term.error, term.iterations, across.detach(), 0.0)
    within_a, within_b = a.own_distances(), b.own_distances()
    if outer == "sliced":
        blocks = torch.cat([torch.cat([within_a, across], 1), torch.cat([across.T, within_b], 1)])
        value = sliced_with_labels(x, a.index, y, b.index, blocks, projections, seed)
        return OTDDResult(value, 0.0, 0, across.detach(), 0.0)
    scale = (mean_cost(a, within_a) + mean_cost(b, within_b)) / 2
    fallback = float((x.detach().mean(0) - y.detach().mean(0)).square().sum() + across.detach().mean())
    temperature = _temperature(epsilon, epsilon_units, scale, fallback)
    options = temperature, tolerance, backend
    term = _term(a, b, across, *options)
    own = _term(a, a, within_a, *options).value + _term(b, b, within_b, *options).value
    return OTDDResult((term.value - own / 2).to(x.dtype), term.error, term.iterations, across.detach(), temperature)

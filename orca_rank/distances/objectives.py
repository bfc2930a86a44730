"""What alignment minimises: a distance to a source that never changes, as a function of target features.

Each class is built once with the source features (n, d) and labels (n,), and called with target features (m, d) and
labels (m,); it returns a scalar, differentiable in the target features.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from orca_rank.distances._inputs import full_precision, pair, points
from orca_rank.distances._pairs import gaussian_radial, pair_sum
from orca_rank.distances.gaussian import bures_wasserstein
from orca_rank.distances.labelled import check_inner
from orca_rank.distances.legacy import legacy_class_distances, legacy_otdd
from orca_rank.distances.mmd import bandwidth_of
from orca_rank.distances.otdd import OTDDSource
from orca_rank.distances.sliced import sliced_wasserstein

Features = Float[Tensor, "n d"]
Labels = Int[Tensor, " n"]


class OTDD:
    """Debiased Sinkhorn OTDD² (see `otdd`), the source's own term computed once.

    Args:
        source: (n, d). label: (n,). inner: "gaussian", "exact", "means" or "none". epsilon: relative temperature, null
            for the default. detach_labels: leave the label term out of the gradient.
        backend: "native", "geomloss" or "geomloss_online", as in `otdd`.
    """

    def __init__(
        self,
        source: Features,
        label: Labels,
        inner: str = "gaussian",
        epsilon: float | None = None,
        detach_labels: bool = False,
        backend: str = "native",
    ) -> None:
        self.source = OTDDSource(source, label, inner=inner, epsilon=epsilon, backend=backend)
        self.detach_labels = detach_labels

    def __call__(self, target: Features, label: Labels) -> Float[Tensor, ""]:
        return self.source.distance(target, label, detach_labels=self.detach_labels).value


class LegacyOTDD:
    """Half of OTDD² as ORCA's code computes it (see `legacy_otdd`): entropic, annealed and not run to convergence.

    Args:
        source: (n, d). label: (n,). inner: "exact", a Sinkhorn distance between the classes' samples that is a constant
            in the gradient, "gaussian", "means" or "none". epsilon: blur², absolute, in units of the half cost.

    Raises:
        ValueError: for another inner, or an epsilon that is not positive.
    """

    def __init__(self, source: Features, label: Labels, inner: str = "exact", epsilon: float = 0.1) -> None:
        check_inner(inner)
        if isinstance(epsilon, bool | str) or not epsilon > 0:
            raise ValueError(f"epsilon={epsilon}: expected a positive number, blur² of the half cost")
        self.source, self.label, self.inner, self.epsilon = points(source), label, inner, float(epsilon)
        self.own = legacy_class_distances(self.source, label) if inner == "exact" else None

    def __call__(self, target: Features, label: Labels) -> Float[Tensor, ""]:
        return legacy_otdd(
            self.source, self.label, target, label, inner=self.inner, epsilon=self.epsilon, x_distances=self.own
        ).value


class MMD:
    """Biased multi-kernel MMD² (see `mmd`).

    Args:
        source: (n, d). label: not used. kernels: bandwidths a factor 2 apart. bandwidth: a squared distance, null for
            the mean one within the source, or "pooled" for that of source and target together, new in every step and
            a constant in its gradient, as ORCA's: it pulls a target from however far. ORCA compares with as many source
            features as there are target ones, drawn anew in every step; here it is always with all.

    Raises:
        ValueError: for another bandwidth.
    """

    def __init__(self, source: Features, label: Labels, kernels: int = 5, bandwidth: float | str | None = None) -> None:
        if kernels < 1:
            raise ValueError(f"kernels must be at least 1, received {kernels}")
        self.source, self.kernels = points(source), kernels
        self.bandwidth = self._fixed(bandwidth)
        self.own = None if self.bandwidth is None else self._within(self.source, self.bandwidth)

    def _fixed(self, bandwidth: float | str | None) -> float | None:
        if bandwidth == "pooled":
            return None
        if bandwidth is None:
            return bandwidth_of(self.source, self.source, "mean")
        if isinstance(bandwidth, bool | str) or not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth}: expected a positive number (a squared distance), pooled or null")
        return float(bandwidth)

    def _within(self, z: Features, h: float) -> Float[Tensor, ""]:
        """The mean kernel of all pairs, those of a point with itself among them."""
        return (pair_sum(z, None, gaussian_radial(h, self.kernels)) + len(z) * self.kernels) / len(z) ** 2

    @full_precision
    def __call__(self, target: Features, label: Labels) -> Float[Tensor, ""]:
        x, y = pair(self.source, target)
        h = bandwidth_of(x, y, "mean") if self.bandwidth is None else self.bandwidth
        own = self._within(x, h) if self.own is None else self.own
        return own + self._within(y, h) - 2 * pair_sum(x, y, gaussian_radial(h, self.kernels)) / (len(x) * len(y))


class Sliced:
    """Sliced W₂² (see `sliced_wasserstein`) times the dimension, so that a translation by t costs about ‖t‖².

    Args:
        source: (n, d). label: not used. projections: random directions, the same in every step.
    """

    def __init__(self, source: Features, label: Labels, projections: int = 64) -> None:
        self.source, self.projections = source, projections

    def __call__(self, target: Features, label: Labels) -> Float[Tensor, ""]:
        return target.shape[1] * sliced_wasserstein(self.source, target, projections=self.projections)


class Bures:
    """Bures-Wasserstein distance of the Gaussian fits (see `bures_wasserstein`).

    Args:
        source: (n, d). label: not used.
    """

    def __init__(self, source: Features, label: Labels) -> None:
        self.source = source

    def __call__(self, target: Features, label: Labels) -> Float[Tensor, ""]:
        return bures_wasserstein(self.source, target)


class L2:
    """Squared distance of the means, ‖m_source − m_target‖².

    Args:
        source: (n, d). label: not used.
    """

    def __init__(self, source: Features, label: Labels) -> None:
        self.mean = points(source).mean(0)

    @full_precision
    def __call__(self, target: Features, label: Labels) -> Float[Tensor, ""]:
        return (points(target).mean(0) - self.mean).square().sum()

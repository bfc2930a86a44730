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
from orca_rank.distances.mmd import bandwidth_of
from orca_rank.distances.otdd import OTDDSource
from orca_rank.distances.sliced import sliced_wasserstein

Features = Float[Tensor, "n d"]
Labels = Int[Tensor, " n"]


class OTDD:
    """Debiased Sinkhorn OTDD² (see `otdd`), the source's own term computed once.

    Args:
        source: (n, d). label: (n,). inner: "gaussian", "exact", "means" or "none". epsilon: relative temperature, null
            for the default. detach_labels: leave the label term out of the gradient, as ORCA's exact mode does.
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


class MMD:
    """Biased multi-kernel MMD² (see `mmd`) with a fixed bandwidth: mean squared distance within the source.

    Args:
        source: (n, d). label: not used. kernels: bandwidths a factor 2 apart. bandwidth: a number, or null.
    """

    def __init__(self, source: Features, label: Labels, kernels: int = 5, bandwidth: float | None = None) -> None:
        self.source = points(source)
        self.kernels = kernels
        self.bandwidth = bandwidth or bandwidth_of(self.source, self.source, "mean")
        n, radial = len(source), gaussian_radial(self.bandwidth, kernels)
        self.own = (pair_sum(self.source, None, radial) + n * kernels) / n**2

    @full_precision
    def __call__(self, target: Features, label: Labels) -> Float[Tensor, ""]:
        x, y = pair(self.source, target)
        m, radial = len(y), gaussian_radial(self.bandwidth, self.kernels)
        within = (pair_sum(y, None, radial) + m * self.kernels) / m**2
        return self.own + within - 2 * pair_sum(x, y, radial) / (len(x) * m)


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

"""Maximum mean discrepancy (Gretton et al. 2012) and the energy distance (Székely & Rizzo 2013).

    MMD² = E k(x, x′) + E k(y, y′) − 2 E k(x, y),   k(x, y) = Σ_i exp(−‖x − y‖² / h_i),  h_i = h 2^{i − ⌊kernels/2⌋}

kernels=5, bandwidth="mean", unbiased=False is ORCA's loss. The bandwidth h is a constant in the gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orca_rank.distances._inputs import full_precision, pair, squared_distances
from orca_rank.distances._pairs import distance_radial, gaussian_radial, pair_sum

MEDIAN_SAMPLES = 1000  # of each sample, for the median bandwidth


class MovingBandwidth:
    """A bandwidth h that follows the data slowly: h ← decay · h + (1 − decay) · (rule of this call).

    Pass one object to every call of `mmd` in a training loop.

    Args:
        rule: "median" or "mean". decay: in [0, 1); 0 follows every batch.

    Raises:
        ValueError: for another rule or decay.
    """

    def __init__(self, rule: str = "median", decay: float = 0.9) -> None:
        if rule not in ("median", "mean"):
            raise ValueError(f"rule must be 'median' or 'mean', received {rule!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), received {decay}")
        self.rule, self.decay = rule, decay
        self.value: float | None = None

    def update(self, x: Tensor, y: Tensor) -> float:
        """Take in one pair of samples and return h."""
        fresh = bandwidth_of(x, y, self.rule)
        self.value = fresh if self.value is None else self.decay * self.value + (1 - self.decay) * fresh
        return self.value


def bandwidth_of(x: Tensor, y: Tensor, rule: str) -> float:
    """Mean or median of ‖z − z′‖² over pairs of different points of the pooled sample; 1 where that is 0.

    The mean takes O(n d): Σ_ij ‖z_i − z_j‖² = 2 N Σ ‖z_i − z̄‖². The median is taken over at most 1,000 evenly spaced
    samples of each, and falls back to the mean where it is 0.
    """
    x, y = x.detach(), y.detach()
    n = len(x) + len(y)
    if rule == "median":
        z = torch.cat([s[:: -(-len(s) // MEDIAN_SAMPLES)] for s in (x, y)])
        left, right = torch.triu_indices(len(z), len(z), 1, device=z.device)
        if len(left) and (median := float(squared_distances(z, z)[left, right].median())) > 0:
            return median
    mean = (x.sum(0, dtype=torch.float64) + y.sum(0, dtype=torch.float64)) / n
    spread = sum(float((s - mean.to(s)).square().sum(dtype=torch.float64)) for s in (x, y))
    return 2 * spread / max(n - 1, 1) or 1.0


def resolve_bandwidth(x: Tensor, y: Tensor, bandwidth: str | float | MovingBandwidth) -> float:
    """h of a rule, a number or a moving average.

    Raises:
        ValueError: for another rule or a number that is not positive.
    """
    if isinstance(bandwidth, MovingBandwidth):
        return bandwidth.update(x, y)
    if isinstance(bandwidth, str):
        if bandwidth not in ("median", "mean"):
            raise ValueError(f"bandwidth must be 'median', 'mean', a number or MovingBandwidth, received {bandwidth!r}")
        return bandwidth_of(x, y, bandwidth)
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive (a squared distance), received {bandwidth}")
    return float(bandwidth)


@full_precision
def mmd(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    *,
    bandwidth: str | float | MovingBandwidth = "median",
    unbiased: bool = True,
    kernels: int = 1,
    block: int | None = None,
    features: int | None = None,
    seed: int = 0,
) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy with Gaussian kernels (Gretton et al. 2012, eqs. 3 and 5).

    Args:
        x: (n, d). y: (m, d), m may differ. Both are computed in float32 or better, in chunks: nothing of size
            n × m × d, or n × m for large samples, is ever held.
        bandwidth: h, in units of a squared distance: "median" or "mean" of the pooled squared distances, a number, or
            a `MovingBandwidth`.
        unbiased: the U-statistic, whose mean is 0 for equal distributions and which may be negative; False is the
            V-statistic, which includes the pairs of a point with itself.
        kernels: number of kernels in the sum, bandwidths a factor 2 apart, h in the middle.
        block: average the statistic over random blocks of so many samples of each (Zaremba et al. 2013): O(n · block).
        features: use so many random Fourier features (Rahimi & Recht 2007) instead of all pairs: O(n · features).
        seed: of the blocks and features.

    Raises:
        ValueError: for bad shapes or options, values that are not finite, or a single sample with unbiased=True.
    """
    if kernels < 1:
        raise ValueError(f"kernels must be at least 1, received {kernels}")
    if block is not None and features is not None:
        raise ValueError(f"give block or features, not both; received block={block}, features={features}")
    x, y = pair(x, y, minimum=2 if unbiased else 1)
    h = resolve_bandwidth(x, y, bandwidth)
    if features is not None:
        return _random_features(x, y, h, kernels, features, unbiased, seed)
    if block is not None:
        return _blocks(x, y, h, kernels, block, unbiased, seed)
    return _statistic(x, y, h, kernels, unbiased)


def _statistic(x: Tensor, y: Tensor, h: float, kernels: int, unbiased: bool) -> Tensor:
    radial = gaussian_radial(h, kernels)
    value = -2 * pair_sum(x, y, radial) / (len(x) * len(y))
    for z in (x, y):
        n = len(z)
        value = value + (
            pair_sum(z, None, radial) / (n * (n - 1)) if unbiased else (pair_sum(z, None, radial) + n * kernels) / n**2
        )
    return value


def _blocks(x: Tensor, y: Tensor, h: float, kernels: int, block: int, unbiased: bool, seed: int) -> Tensor:
    if block < 2:
        raise ValueError(f"block must be at least 2, received {block}")
    generator = torch.Generator().manual_seed(seed)
    count = max(1, min(len(x), len(y)) // block)
    orders = [torch.randperm(len(z), generator=generator).to(z.device).tensor_split(count) for z in (x, y)]
    values = [_statistic(x[i], y[j], h, kernels, unbiased) for i, j in zip(*orders, strict=True)]
    return torch.stack(values).mean()


def _random_features(x: Tensor, y: Tensor, h: float, kernels: int, features: int, unbiased: bool, seed: int) -> Tensor:
    if features < 1:
        raise ValueError(f"features must be at least 1, received {features}")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(x.shape[1], features, generator=generator, dtype=torch.float64)
    # exp(−‖x − y‖²/h) = E cos(wᵀ(x − y)) for w ~ N(0, 2/h I)
    scales = [(2 / (h * 2.0 ** (i - kernels // 2))) ** 0.5 for i in range(kernels)]
    total = x.new_zeros(())
    for scale in scales:
        w = (gaussian * scale).to(x)
        sums = [_embed_sum(z, w) for z in (x, y)]
        for z, s in zip((x, y), sums, strict=True):
            n = len(z)
            power = s.square().sum() / features  # Σ_ij k, its diagonal n
            total = total + ((power - n) / (n * (n - 1)) if unbiased else power / n**2)
        total = total - 2 * (sums[0] * sums[1]).sum() / features / (len(x) * len(y))
    return total


def _embed_sum(z: Tensor, w: Tensor, chunk: int = 8192) -> Tensor:
    """Σ_i (cos wᵀz_i, sin wᵀz_i), (2 F,)."""
    total = z.new_zeros(2 * w.shape[1])
    for part in z.split(chunk):
        phase = part @ w
        total = total + torch.cat([phase.cos().sum(0), phase.sin().sum(0)])
    return total


@full_precision
def energy_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, unbiased: bool = True) -> Float[Tensor, ""]:
    """Energy distance 2 E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖ (Székely & Rizzo 2013, eq. 1.1).

    Args:
        x: (n, d). y: (m, d). unbiased: leave out the pairs of a point with itself (U-statistic, may be negative).

    Raises:
        ValueError: for bad shapes, values that are not finite, or a single sample with unbiased=True.
    """
    x, y = pair(x, y, minimum=2 if unbiased else 1)
    value = 2 * pair_sum(x, y, distance_radial) / (len(x) * len(y))
    for z in (x, y):
        n = len(z)
        value = value - pair_sum(z, None, distance_radial) / (n * (n - 1) if unbiased else n**2)
    return value

"""Random coefficients of Darcy flow: a thresholded Gaussian field, as in the published script of FNO.

Reference:
    [1] Li et al., Fourier Neural Operator (2020), data_generation/darcy (GRF.m and the demo script).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.fft import dctn, idctn


def spectrum(K: int, alpha: float = 2.0, tau: float = 3.0) -> Float[np.ndarray, "K K"]:
    """Standard deviation of every cosine mode, τ^{α−1} (π²(k₁² + k₂²) + τ²)^{−α/2}, the constant mode 0 [1].

    The pixel mean of the field's variance is the sum of its squares (0.0853 for the defaults and large K).
    """
    k = np.arange(K, dtype=np.float64)
    deviation = tau ** (alpha - 1) * (np.pi**2 * (k[:, None] ** 2 + k**2) + tau**2) ** (-alpha / 2)
    deviation[0, 0] = 0.0
    return deviation


def gaussian_field(
    n: int,
    K: int,
    *,
    seed: int,
    first: int = 0,
    stream: int = 0,
    alpha: float = 2.0,
    tau: float = 3.0,
    positions: str = "centres",
) -> Float[np.ndarray, "n K K"]:
    """Samples of g = idct2(K · spectrum · ξ), ξ standard normal: covariance of (−Δ + τ²)^{−α} with Neumann sides.

    Args:
        n: number of samples.
        K: points per side.
        seed, stream: name an endless sequence of independent samples; sample i depends on (seed, stream, i) and K
            alone, so it is the same however many are drawn and whoever draws them.
        first: index of the first sample drawn.
        alpha, tau: smoothness and inverse length of the field.
        positions: "centres" evaluates the cosine series at (i + ½)/K, as published; "nodes" evaluates the same
            series at i/(K − 1).

    Raises:
        ValueError: for a grid below 2 points, a negative count or index, or an unknown kind of positions.
    """
    if K < 2 or n < 0 or first < 0:
        raise ValueError(f"expected K >= 2, n >= 0 and first >= 0, received K={K}, n={n}, first={first}")
    if positions not in ("centres", "nodes"):
        raise ValueError(f"positions must be 'centres' or 'nodes', received {positions!r}")
    deviation = K * spectrum(K, alpha, tau)
    field = np.empty((n, K, K))
    for i in range(n):
        stream_i = np.random.SeedSequence(seed, spawn_key=(stream, first + i))
        series = deviation * np.random.default_rng(stream_i).standard_normal((K, K))
        field[i] = idctn(series, type=2, norm="ortho") if positions == "centres" else _at_nodes(series)
    return field


def _at_nodes(series: Float[np.ndarray, "K K"]) -> Float[np.ndarray, "K K"]:
    """The orthonormal cosine series evaluated at i/(K − 1): a DCT of the first kind after rescaling the modes."""
    K = len(series)
    weight = np.full(K, np.sqrt(2 / K) / 2)  # the transform doubles the inner modes ...
    weight[0] = 1 / np.sqrt(K)
    weight[-1] = np.sqrt(2 / K)  # ... and neither the first nor the last
    return dctn(series * weight[:, None] * weight, type=1)


def sample_coefficient(
    n: int,
    K: int,
    *,
    seed: int,
    first: int = 0,
    stream: int = 0,
    low: float = 3.0,
    high: float = 12.0,
    alpha: float = 2.0,
    tau: float = 3.0,
    positions: str = "centres",
    dtype: type = np.float32,
) -> Float[np.ndarray, "n K K"]:
    """Piecewise constant coefficients: `high` (12) where the Gaussian field is >= 0, else `low` (3).

    The published data have 12 and 3 (the published example script says 12 and 4). Values live at the cell centres
    (i + ½)/K unless positions="nodes"; see `gaussian_field` for the other arguments.

    Raises:
        ValueError: as `gaussian_field`, and when the values are not positive.
    """
    if not (low > 0 and high > 0):
        raise ValueError(f"the coefficient must be positive, received low={low}, high={high}")
    if n < 0:
        raise ValueError(f"expected n >= 0, received n={n}")
    out: np.ndarray = np.empty((n, K, K), dtype=dtype)
    for i in range(n):  # one field at a time, to hold one in memory
        field = gaussian_field(
            1, K, seed=seed, first=first + i, stream=stream, alpha=alpha, tau=tau, positions=positions
        )
        out[i] = np.where(field[0] >= 0, high, low)
    return out

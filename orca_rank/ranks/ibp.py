"""The Indian buffet process and the three priors on a layer's rank that come from it.

Sources: Griffiths and Ghahramani, "The Indian Buffet Process", JMLR 12 (2011); Teh, Görür and Ghahramani,
"Stick-breaking Construction for the Indian Buffet Process", AISTATS 2007.
"""

from __future__ import annotations

import math
from collections import Counter
from numbers import Real

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.special import gammaln, xlog1py, xlogy

from orca_rank.ranks.allocate import power


def sample_ibp(n: int, alpha: float, *, seed: int | None = None) -> Int[np.ndarray, "n K"]:
    """Draw Z: customer i takes dish k with probability m_k/i and Poisson(α/i) new dishes.

    Args:
        n: customers. alpha: mean number of dishes of one customer.

    Returns:
        Z (n, K) of 0 and 1, columns in the order in which the dishes were first taken, none empty.

    Raises:
        ValueError: if n < 1 or alpha is not positive and finite.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 customer, got {n}")
    _positive(alpha)
    generator = np.random.default_rng(seed)
    taken = np.zeros(0, dtype=np.int64)  # m_k of the dishes so far
    rows = []
    for customer in range(1, n + 1):
        old = (generator.random(taken.size) < taken / customer).astype(np.int64)
        new = np.ones(generator.poisson(alpha / customer), dtype=np.int64)
        rows.append(np.concatenate([old, new]))
        taken = np.concatenate([taken + old, new])
    z = np.zeros((n, taken.size), dtype=np.int64)
    for index, row in enumerate(rows):
        z[index, : row.size] = row
    return z


def log_prob_ibp(z: ArrayLike, alpha: float) -> float:
    """log P(Z) = K₊ log α − Σ_i log K₁⁽ⁱ⁾! − α H_N + Σ_k [log (N − m_k)! + log (m_k − 1)! − log N!].

    The probability that the process yields Z with its columns in the order of first appearance; over all such Z it sums
    to 1. K₁⁽ⁱ⁾ counts the columns whose first 1 stands in row i; empty columns do not count.

    Args:
        z: (N, K) of 0 and 1, in any order of columns (the value is the same).

    Raises:
        ValueError: if z is not a binary matrix or alpha is not positive and finite.
    """
    matrix = _binary(z)
    matrix = matrix[:, matrix.any(axis=0)]
    new = Counter(matrix.argmax(axis=0).tolist())
    return _shared_terms(matrix, alpha) - sum(math.lgamma(count + 1) for count in new.values())


def log_prob_left_ordered(z: ArrayLike, alpha: float) -> float:
    """log probability of the left-ordered class of Z: as `log_prob_ibp` with Π_h K_h! in place of Π_i K₁⁽ⁱ⁾!, K_h the
    number of columns equal to the binary history h (Griffiths and Ghahramani, equation 14)."""
    matrix = _binary(z)
    matrix = matrix[:, matrix.any(axis=0)]
    histories = Counter(map(tuple, matrix.T.tolist()))
    return _shared_terms(matrix, alpha) - sum(math.lgamma(count + 1) for count in histories.values())


def left_ordered(z: ArrayLike) -> Int[np.ndarray, "n K"]:
    """Columns without the empty ones, sorted as binary numbers with the first row most significant, largest first."""
    matrix = _binary(z)
    matrix = matrix[:, matrix.any(axis=0)]
    return matrix[:, np.lexsort(matrix[::-1])[::-1]] if matrix.shape[1] else matrix


def poisson_law(
    alpha: Float[np.ndarray, " layers"], low: Int[np.ndarray, " layers"], high: Int[np.ndarray, " layers"]
) -> Float[np.ndarray, "layers ranks"]:
    """Count prior: r_i ~ Poisson(α_i), each customer's number of dishes, truncated to [low_i, high_i].

    Returns:
        probabilities of the ranks 0 .. max(high), one row per layer.
    """
    rank = np.arange(high.max(initial=0) + 1)
    return _truncate(xlogy(rank, alpha[:, None]) - gammaln(rank + 1), low, high)


def stick_law(
    alpha: Float[np.ndarray, " layers"], low: Int[np.ndarray, " layers"], high: Int[np.ndarray, " layers"]
) -> Float[np.ndarray, "layers ranks"]:
    """Stick-breaking prior: ν_k ~ Beta(α, 1), π_k = Π_{j<=k} ν_j, E[π_k] = (α/(1+α))^k read as the survival P(r >= k),
    so P(r = k) = (1/(1+α)) (α/(1+α))^k, truncated to [low_i, high_i]. Its mean without truncation is α. With low = 1 it
    is the law p(b) = (1/(1+α)) (α/(1+α))^{b−1} from which DyLoRA draws the rank of a layer."""
    rank = np.arange(high.max(initial=0) + 1)
    return _truncate(xlogy(rank, (alpha / (1 + alpha))[:, None]), low, high)


def beta_bernoulli_law(
    alpha: Float[np.ndarray, " layers"],
    low: Int[np.ndarray, " layers"],
    high: Int[np.ndarray, " layers"],
    features: Int[np.ndarray, " layers"] | None = None,
) -> Float[np.ndarray, "layers ranks"]:
    """Finite prior: π_k ~ Beta(α/K, 1) for k = 1 .. K, r the number of active ones: Binomial(K, α/(K + α)), of mean
    α/(1 + α/K), truncated to [low_i, high_i].

    Args:
        features: K per layer; by default high_i.
    """
    number = (high if features is None else features)[:, None].astype(float)
    rank = np.arange(high.max(initial=0) + 1)
    active = alpha[:, None] / np.maximum(number + alpha[:, None], np.finfo(float).tiny)
    choose = gammaln(number + 1) - gammaln(rank + 1) - gammaln(np.maximum(number - rank, 0) + 1)
    log_weight = choose + xlogy(rank, active) + xlog1py(np.maximum(number - rank, 0), -active)
    return _truncate(np.where(rank <= number, log_weight, -np.inf), low, high)


def concentration(gaps: Float[np.ndarray, " layers"], mean: float, gamma: float = 1.0) -> np.ndarray:
    """α_i = a D_i^γ / mean(D^γ), so that the mean of the α_i is a; all alike if no layer shows a gap.

    Raises:
        ValueError: if a is no finite number >= 0, or gamma as in `allocate.power`.
    """
    if not isinstance(mean, Real) or not 0 <= mean < math.inf:
        raise ValueError(f"a, the mean prior rank, must be a finite number >= 0, got {mean!r}")
    weights = power(np.maximum(gaps, 0.0), gamma)
    if not weights.any():
        weights = np.ones_like(weights)
    return float(mean) * weights / weights.mean()


def _truncate(log_weight: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    rank = np.arange(log_weight.shape[1])
    inside = (rank >= low[:, None]) & (rank <= high[:, None])
    log_weight = np.where(inside, log_weight, -np.inf)
    # With α = 0 and low > 0 no rank has mass: the limit α -> 0 puts all of it on `low`.
    log_weight = np.where(np.isneginf(log_weight).all(1, keepdims=True) & (rank == low[:, None]), 0.0, log_weight)
    weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def _shared_terms(matrix: np.ndarray, alpha: float) -> float:
    _positive(alpha)
    customers, dishes = matrix.shape
    chosen = matrix.sum(axis=0)
    harmonic = sum(1 / i for i in range(1, customers + 1))
    columns = gammaln(customers - chosen + 1) + gammaln(chosen) - gammaln(customers + 1)
    return float(dishes * math.log(alpha) - alpha * harmonic + columns.sum())


def _binary(z: ArrayLike) -> np.ndarray:
    matrix = np.asarray(z)
    if matrix.ndim != 2 or matrix.shape[0] < 1 or not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"Z must be a matrix (customers, dishes) of 0 and 1, got shape {matrix.shape}")
    return matrix.astype(np.int64)


def _positive(alpha: float) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")

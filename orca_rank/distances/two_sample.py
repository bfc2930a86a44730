"""Two-sample tests: proxy A-distance, nearest neighbours, and the permutation p-value of any statistic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from orca_rank.distances._inputs import full_precision, pair, squared_distances
from orca_rank.distances._pairs import gaussian_radial
from orca_rank.distances.mmd import MovingBandwidth, energy_distance, mmd, resolve_bandwidth


@full_precision
def proxy_a_distance(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, folds: int = 5, c: float = 0.1, seed: int = 0
) -> Float[Tensor, ""]:
    """Proxy A-distance 2 (1 − 2 ε), ε the cross-validated balanced error of telling x from y (Ben-David et al. 2007).

    Args:
        x: (n, d). y: (m, d). folds: cross-validation folds, at most the smaller sample. c: inverse L2 penalty of the
            logistic regression on standardised features. seed: of the folds.

    Returns:
        about 0 where the samples cannot be told apart (noise may make it negative), 2 where they always can.
        Not differentiable.

    Raises:
        ValueError: for bad shapes, values that are not finite, or fewer than two folds.
    """
    from sklearn.linear_model import LogisticRegression  # here, because they take seconds
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = pair(x, y, minimum=2)
    if folds < 2:
        raise ValueError(f"folds must be at least 2, received {folds}")
    features = torch.cat([x, y]).detach().cpu().double().numpy()
    domain = np.repeat([0, 1], [len(x), len(y)])
    splitter = StratifiedKFold(min(folds, len(x), len(y)), shuffle=True, random_state=seed)
    wrong = np.zeros(len(domain))
    for train, test in splitter.split(features, domain):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=1000))
        model.fit(features[train], domain[train])
        wrong[test] = model.predict(features[test]) != domain[test]
    error = (wrong[domain == 0].mean() + wrong[domain == 1].mean()) / 2
    return x.new_tensor(2 * (1 - 2 * error))


@full_precision
def knn_two_sample(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, k: int = 5) -> Float[Tensor, ""]:
    """Nearest-neighbour statistic (Schilling 1986; Henze 1988): how far neighbours keep to their own sample.

        (T − T₀) / (1 − T₀),   T = mean share of the k neighbours from the own sample,  T₀ = its mean under equality

    Args:
        x: (n, d). y: (m, d). k: neighbours, fewer than n + m.

    Returns:
        about 0 where the samples come from one distribution, 1 where they are apart. Not differentiable.

    Raises:
        ValueError: for bad shapes, values that are not finite, or k out of range.
    """
    x, y = pair(x.detach(), y.detach())
    n, m = len(x), len(y)
    if not 1 <= k < n + m:
        raise ValueError(f"k must lie between 1 and n + m − 1 = {n + m - 1}, received {k}")
    z = torch.cat([x, y])
    domain = torch.arange(n + m, device=z.device) >= n
    same = z.new_zeros((), dtype=torch.float64)
    for start in range(0, n + m, 1024):
        distances = squared_distances(z[start : start + 1024], z)
        distances.diagonal(start).fill_(float("inf"))
        nearest = distances.topk(k, largest=False).indices  # (rows, k)
        same += (domain[nearest] == domain[start : start + 1024, None]).double().sum()
    share = float(same) / (k * (n + m))
    expected = (n * (n - 1) + m * (m - 1)) / ((n + m) * (n + m - 1))
    return x.new_tensor((share - expected) / (1 - expected))


Statistic = Callable[[Tensor, Tensor], Tensor]


@full_precision
def permutation_p_value(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    statistic: Statistic = mmd,
    *,
    permutations: int = 200,
    seed: int = 0,
    bandwidth: str | float | MovingBandwidth = "median",
    kernels: int = 1,
) -> float:
    """P-value of "x and y come from one distribution" by permuting the pooled sample (Phipson & Smyth 2010).

        p = (1 + #{permuted statistic ≥ observed}) / (1 + permutations)

    For `mmd` and `energy_distance` (unbiased) the pooled kernel is computed once, and all permutations are one matrix
    product; any other function (x, y) -> scalar is called for each permutation.

    Args:
        x: (n, d). y: (m, d). statistic: large where the samples differ. permutations: at least 1. seed: of them.
        bandwidth, kernels: of statistic=mmd.

    Raises:
        ValueError: for bad shapes, values that are not finite, or no permutations.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, received {permutations}")
    x, y = pair(x.detach(), y.detach(), minimum=2)
    z, n = torch.cat([x, y]), len(x)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(len(z))] + [torch.randperm(len(z), generator=generator) for _ in range(permutations)]
    if statistic is mmd or statistic is energy_distance:
        distances = squared_distances(z, z).double()
        if statistic is mmd:
            kernel = gaussian_radial(resolve_bandwidth(x, y, bandwidth), kernels)(distances)[0]
        else:
            kernel = -distances.sqrt_()
        values = _from_kernel(kernel.fill_diagonal_(0), torch.stack(orders).to(z.device), n)
    else:
        values = torch.tensor([float(statistic(z[o[:n].to(z.device)], z[o[n:].to(z.device)])) for o in orders])
    # Rounding must not make the identity's own value look smaller than an equal one.
    slack = 1e-9 * float(values.abs().max())
    return (1 + int((values[1:] >= values[0] - slack).sum())) / (1 + permutations)


def _from_kernel(kernel: Tensor, orders: Tensor, n: int) -> Tensor:
    """Unbiased statistics of many splits of one kernel matrix with zero diagonal, (R,)."""
    total = kernel.shape[0]
    m = total - n
    member = kernel.new_zeros(total, len(orders)).scatter_(0, orders[:, :n].T, 1.0)  # (N, R)
    image = kernel @ member
    within_x = (member * image).sum(0)
    between = image.sum(0) - within_x
    within_y = kernel.sum() - within_x - 2 * between
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)

"""Distances between source and held-out target features, before and after alignment, with intervals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from orca_rank.distances import mmd, otdd, sliced_wasserstein
from orca_rank.training.features import Source

Distances = dict[str, dict[str, float]]


def _all(x: Tensor, x_label: Tensor, y: Tensor, y_label: Tensor, bandwidth: float) -> dict[str, float]:
    return {
        "otdd": float(otdd(x, x_label, y, y_label, epsilon=0.01).value),
        "mmd": float(mmd(x, y, bandwidth=bandwidth)),
        "sliced": x.shape[1] * float(sliced_wasserstein(x, y)),
    }


@torch.no_grad()
def compare(source: Source, features: Tensor, labels: Tensor, resamples: int, seed: int) -> Distances:
    """OTDD² (ε = 1 % of the scale), unbiased MMD² and d · SW₂² of equally many source and held-out target images.

    Intervals are 90 % half-sampling intervals: D is recomputed on random halves of both samples, drawn without
    replacement (repeated points of an ordinary bootstrap would bias optimal transport), and the spread of the halves
    about their mean is put around the value.

    Args:
        source: see `Source`. features: (m, d). labels: (m,). resamples: half-samples. seed: of the draws.

    Raises:
        ValueError: for fewer than 4 held-out images.
    """
    if len(features) < 4:
        raise ValueError(f"the held-out distance needs at least 4 validation images, received {len(features)}")
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(source.features), generator=draw)[: len(features)]
    x, x_label = source.features[chosen], source.labels[chosen]
    bandwidth = 2.0 * float(x.var(0).sum()) or 1.0  # E‖x − x′‖² within the source: the same before and after
    value = _all(x, x_label, features, labels, bandwidth)
    halves: dict[str, list[float]] = {name: [] for name in value}
    for _ in range(resamples):
        i = torch.randperm(len(x), generator=draw)[: len(x) // 2]
        j = torch.randperm(len(features), generator=draw)[: len(features) // 2]
        for name, half in _all(x[i], x_label[i], features[j], labels[j], bandwidth).items():
            halves[name].append(half)
    result = {}
    for name, centre in value.items():
        spread = torch.tensor(halves[name])
        low, high = (spread - spread.mean()).quantile(torch.tensor([0.05, 0.95])).tolist() if len(spread) else (0, 0)
        result[name] = {"value": centre, "low": centre + low, "high": centre + high}
    return result


def sentence(distances: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The held-out distances in words."""
    parts = [
        f"{name} {pair['before']['value']:.4g} -> {pair['after']['value']:.4g}" for name, pair in distances.items()
    ]
    return f"held-out distance to the source: {'; '.join(parts)}"

"""Pseudo-classes for images without labels."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orca_rank.normaliser import Normaliser, chunk_of


def pseudo_labels(x: Tensor, clusters: int, seed: int, side: int = 16) -> Tensor:
    """K-means classes (n,) of the pixels of x (n, C, H, W), average-pooled to at most side × side.

    Raises:
        ValueError: for fewer than 2 clusters or more than samples.
    """
    if not 2 <= clusters <= len(x):
        raise ValueError(f"clusters must lie between 2 and the number of samples {len(x)}, received {clusters}")
    size = min(side, x.shape[-2]), min(side, x.shape[-1])
    scaled = Normaliser.fit(x, "channel")  # no unit of a channel weighs more than another's
    parts = [F.adaptive_avg_pool2d(scaled.encode(part), size).flatten(1) for part in x.split(chunk_of(x))]
    from sklearn.cluster import KMeans  # here, because it takes a second

    fitted = KMeans(clusters, n_init=1, random_state=seed).fit(torch.cat(parts).numpy())
    return torch.from_numpy(fitted.labels_.astype(np.int64))

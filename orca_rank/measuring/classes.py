"""Classes of targets, for alignment and measuring alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from orca_rank.normaliser import Normaliser

if TYPE_CHECKING:
    from sklearn.cluster import KMeans, MiniBatchKMeans

MINI_BATCH = 10_000  # above so many samples k-means works on mini-batches


class Labeller:
    """Class labels as they are; for dense targets the k-means cluster of the flattened field (ORCA, section 3.2).

    Fields are standardised per channel first, missing values (NaN) taken for the mean: the clusters depend on no unit.

    Args:
        y: targets, (n,) integers or (n, c, H, W). clusters: k. seed: of k-means.

    Raises:
        ValueError: for fewer than one cluster.
    """

    def __init__(self, y: Tensor, clusters: int, seed: int) -> None:
        if isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 1:
            raise ValueError(f"align.clusters must be at least 1, received {clusters}")
        self.means: KMeans | MiniBatchKMeans | None = None
        if y.is_floating_point():
            from sklearn.cluster import KMeans, MiniBatchKMeans  # here, because it takes a second

            method = MiniBatchKMeans if len(y) > MINI_BATCH else KMeans
            self.normaliser = Normaliser.fit(y, "channel")
            self.means = method(min(clusters, len(y)), n_init=4, random_state=seed).fit(self._flat(y))

    def __call__(self, y: Tensor) -> Int[Tensor, " n"]:
        if self.means is None:
            return y.long()
        return torch.from_numpy(self.means.predict(self._flat(y)).astype(np.int64))

    def _flat(self, y: Tensor) -> Float[np.ndarray, "n k"]:
        return self.normaliser.encode(y).flatten(1).double().numpy()

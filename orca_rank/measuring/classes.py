"""Classes of targets, for alignment and measuring alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from orca_rank.normaliser import Normaliser, by_place, chunk_of, on_disk

if TYPE_CHECKING:
    from sklearn.cluster import KMeans, MiniBatchKMeans

MINI_BATCH = 10_000  # above so many samples k-means works on mini-batches
SAMPLE = 2**28  # bytes of float64 that k-means is fitted on at most: evenly spaced targets where all have more
SIDE = 8  # cells a side that the class shares of a segmentation are taken in


class Labeller:
    """Class labels as they are; for other targets their k-means cluster (ORCA, section 3.2).

    Fields and vectors are standardised per channel or number first, missing values (NaN) taken for the mean: the
    clusters depend on no unit. Labels of a multi-label task count as 0 and 1, a segmentation as the share of each class
    in at most 8 × 8 cells. Of large targets a sample is clustered, and all are looked up a part at a time, so that they
    may stay on disk.

    Args:
        y: targets: (n,) integers, (n, k) or (n, c, H, W) floats, (n, labels) booleans or (n, H, W) classes, those below
            0 unknown. clusters: k. seed: of k-means.

    Raises:
        ValueError: for fewer than one cluster.
    """

    def __init__(self, y: Tensor, clusters: int, seed: int) -> None:
        if isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 1:
            raise ValueError(f"align.clusters must be at least 1, received {clusters}")
        self.means: KMeans | MiniBatchKMeans | None = None
        if y.is_floating_point() or y.ndim > 1:
            from sklearn.cluster import KMeans, MiniBatchKMeans  # here, because it takes a second

            method = MiniBatchKMeans if len(y) > MINI_BATCH else KMeans
            self.normaliser = Normaliser.fit(y, "channel") if y.is_floating_point() else None
            self.classes = 0 if self.normaliser is not None or y.ndim < 3 else 1 + int(y.max())
            self.means = method(min(clusters, len(y)), n_init=4, random_state=seed).fit(
                self._flat(self._some(y, clusters))
            )

    def __call__(self, y: Tensor) -> Int[Tensor, " n"]:
        if self.means is None:
            return y.long()
        found = np.empty(len(y), np.int64)
        for rows in by_place(y).split(chunk_of(y)):
            found[rows.numpy()] = self.means.predict(self._flat(y[rows]))
        return torch.from_numpy(found)

    def _some(self, y: Tensor, clusters: int) -> Tensor:
        """Evenly spaced targets of SAMPLE bytes, a few of every cluster at least."""
        width = self.classes * SIDE**2 if self.classes else y[:1].numel()
        count = max(8 * clusters, SAMPLE // (8 * width))
        places = torch.linspace(0, len(y) - 1, min(count, len(y)), dtype=torch.float64).long()
        return y[places] if on_disk(y) or count < len(y) else y

    def _flat(self, y: Tensor) -> Float[np.ndarray, "n k"]:
        if self.normaliser is not None:
            return self.normaliser.encode(y).flatten(1).double().numpy()
        if y.ndim == 2:
            return y.double().numpy()
        return torch.cat([class_shares(part, self.classes) for part in y.split(chunk_of(y))]).double().numpy()


def class_shares(y: Int[Tensor, "n h w"], classes: int) -> Float[Tensor, "n k"]:
    """The share of every class in each of at most SIDE × SIDE cells of a segmentation; classes below 0 are unknown."""
    cells = min(SIDE, y.shape[1]), min(SIDE, y.shape[2])
    shares = [F.adaptive_avg_pool2d((y == label).float(), cells).flatten(1) for label in range(classes)]
    return torch.cat(shares, 1)

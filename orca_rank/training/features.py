"""Image features for alignment: the embedder's tokens, averaged, with labels; source features are cached on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

MINI_BATCH = 10_000  # above so many samples k-means works on mini-batches


class Source(NamedTuple):
    """features (n, d): token means of the pretrained embedder; labels (n,); tokens (p, T, d) of the first p images."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    tokens: Float[Tensor, "p T d"]


def token_mean(tokens: Float[Tensor, "b ... d"]) -> Float[Tensor, "b d"]:
    """Mean over tokens, in float32: (B, N, d) or (B, h, w, d) -> (B, d)."""
    return tokens.float().flatten(1, -2).mean(1)


class Labeller:
    """Class labels as they are; for dense targets the k-means cluster of the flattened field (ORCA, section 3.2).

    Args:
        y: training targets, (n,) integers or (n, c, H, W). clusters: k. seed: of k-means.

    Raises:
        ValueError: for fewer than one cluster.
    """

    def __init__(self, y: Tensor, clusters: int, seed: int) -> None:
        if clusters < 1:
            raise ValueError(f"align.clusters must be at least 1, received {clusters}")
        self.means: KMeans | MiniBatchKMeans | None = None
        if y.is_floating_point():
            method = MiniBatchKMeans if len(y) > MINI_BATCH else KMeans
            self.means = method(min(clusters, len(y)), n_init=4, random_state=seed).fit(self._flat(y))

    def __call__(self, y: Tensor) -> Int[Tensor, " n"]:
        if self.means is None:
            return y.long()
        return torch.from_numpy(self.means.predict(self._flat(y)).astype(np.int64))

    @staticmethod
    def _flat(y: Tensor) -> Float[np.ndarray, "n k"]:
        return y.flatten(1).double().numpy()


def plain_loader(data: L.LightningDataModule, part: str, batch_size: int) -> DataLoader:
    """A loader without shuffling, and without augmentation where the module can do without it."""
    if hasattr(data, "loader"):
        loader = data.loader(part)
    else:
        loader = data.train_dataloader() if part == "train" else data.val_dataloader()
    return DataLoader(loader.dataset, batch_size, shuffle=False, collate_fn=loader.collate_fn)


def targets(dataset: Dataset, collate: Any) -> Tensor:
    """All targets of a dataset, (n, ...)."""
    return torch.cat([y for _, y in DataLoader(dataset, 512, shuffle=False, collate_fn=collate)])


@torch.no_grad()
def embed(embedder: nn.Module, loader: DataLoader, limit: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token means (n, d) and targets (n, ...) of the first `limit` samples, on the CPU."""
    embedder.eval().to(device)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for x, y in limited(loader, limit):
        features.append(token_mean(embedder(x.to(device))).cpu())
        labels.append(y)
    return torch.cat(features), torch.cat(labels)


def limited(loader: DataLoader, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    seen = 0
    for x, y in loader:
        yield x[: limit - seen], y[: limit - seen]
        seen += len(x)
        if seen >= limit:
            return

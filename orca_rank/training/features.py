"""Image features for alignment: the embedder's tokens, averaged, with labels; source features are cached on disk."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from orca_rank.data import Data
from orca_rank.data.module import Batches
from orca_rank.measuring.passes import limited


class Source(NamedTuple):
    """features (n, d): token means of the pretrained embedder; labels (n,); tokens (p, T, d) of the first p images."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    tokens: Float[Tensor, "p T d"]


def token_mean(tokens: Float[Tensor, "b ... d"]) -> Float[Tensor, "b d"]:
    """Mean over tokens, in float32: (B, N, d) or (B, h, w, d) -> (B, d)."""
    return tokens.float().flatten(1, -2).mean(1)


def plain_loader(data: Data, part: str, batch_size: int) -> DataLoader:
    """A loader without shuffling, and without augmentation where the module can do without it."""
    if hasattr(data, "loader"):
        loader = data.loader(part)
    else:
        loader = data.train_dataloader() if part == "train" else data.val_dataloader()
    return DataLoader(loader.dataset, batch_size, shuffle=False, collate_fn=loader.collate_fn)


def targets(dataset: Dataset, collate: Any) -> Tensor:
    """All targets of a dataset, (n, ...); of those here without reading inputs, or anything that stays on disk."""
    if isinstance(dataset, Batches) and isinstance(dataset.y, Tensor):
        return dataset.y
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

"""An embedder trained so that the target's features look like the source's, without a run folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orca_rank.api.batches import gathered
from orca_rank.api.models import as_found, device_of
from orca_rank.distances import objectives
from orca_rank.measuring.classes import Labeller
from orca_rank.training.align import AlignOptions, Decay, HeldOut, Objective, RandomTokens
from orca_rank.training.alone import train_embedder
from orca_rank.training.features import Source, token_mean
from orca_rank.training.held_out import compare

OBJECTIVES: dict[str, Callable[..., Any]] = {
    "otdd": objectives.OTDD,
    "mmd": objectives.MMD,
    "sliced": objectives.Sliced,
    "bures": objectives.Bures,
    "l2": objectives.L2,
}


def align(
    embedder: nn.Module,
    source_embedder: nn.Module,
    source: Any,
    target: Any,
    *,
    objective: str | Callable[[Tensor, Tensor], Tensor] = "otdd",
    held_out: Any = None,
    epochs: int = 60,
    lr: float = 1e-2,
    schedule: str = "orca",
    samples_per_class: int = 128,
    batch_size: int = 128,
    source_samples: int = 5000,
    target_samples: int = 10_000,
    clusters: int = 10,
    resamples: int = 20,
    seed: int = 0,
    **options: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """Train `embedder` in place until the token means of the target look like those of the source (ORCA, arXiv
    2302.05738, section 3.2), as stage=align does: AdamW, the rate times 0.2 every 20 epochs.

    Args:
        embedder, source_embedder: images (B, C, H, W) -> tokens (B, ..., d) of one width d; the second is not changed.
        source, target: batches as `orca_rank.measure` takes them, with one tensor of images in each; labels y are
            needed by otdd, and by schedule="orca", which takes a class at a time. k-means clusters stand for y that is
            no class.
        objective: otdd, mmd, sliced, bures or l2, or a function (features (b, d), labels (b,)) -> scalar.
        held_out: target batches that distances are taken on; by default the target's own.
        epochs, lr, schedule, samples_per_class, batch_size: as in conf/align; schedule "orca" or "batch".
        source_samples, target_samples: images that are read, at most. clusters: k of k-means.
        resamples: half-samples behind the 90 % intervals. seed: of every draw.
        options: of the objective, such as inner="exact" or epsilon=0.1 of otdd.

    Returns:
        distance (otdd, mmd, sliced) -> "before" and "after" -> value, low, high.

    Raises:
        ValueError: for an option that means nothing, missing labels, or features of different widths.
            FloatingPointError: for a loss that is not finite.
    """
    settings = AlignOptions(
        schedule=schedule, epochs=epochs, samples_per_class=samples_per_class, batch_size=batch_size,
        source_samples=source_samples, clusters=clusters, decay=Decay(20, 0.2), patience=None, min_delta=0.0,
        random_tokens=RandomTokens(0.0, 0.5, 1), held_out=HeldOut(256, resamples),
    )  # fmt: skip
    if isinstance(objective, str) and objective not in OBJECTIVES:
        raise ValueError(f"there is no objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    near, near_y = gathered(source, source_samples, "source")
    far, far_y = gathered(target, target_samples, "target")
    if far_y is None and schedule == "orca":
        raise ValueError('schedule="orca" takes a class at a time, and the target has no labels: schedule="batch"')
    if objective == "otdd" and (near_y is None or far_y is None):
        raise ValueError('objective="otdd" needs labels on both sides: without them choose mmd or sliced')
    judged, judged_y = (far[:256], far_y) if held_out is None else gathered(held_out, 256, "held_out")
    labeller = None if far_y is None else Labeller(far_y, clusters, seed)

    def classes(y: Tensor | None, images: Tensor) -> Tensor:
        return torch.zeros(len(images), dtype=torch.long) if y is None or labeller is None else labeller(y)

    features = _features(source_embedder, near)
    labels = classes(None, near) if near_y is None else Labeller(near_y, clusters, seed)(near_y)
    reference = Source(features, labels, features.new_zeros(0, 1, features.shape[1]))

    def distances() -> dict[str, dict[str, float]]:
        found = _features(embedder, judged)
        if found.shape[1] != features.shape[1]:
            raise ValueError(f"the embedder gives tokens of width {found.shape[1]}, the source's {features.shape[1]}")
        return compare(reference, found, classes(judged_y, judged)[: len(judged)], resamples, seed)

    before = distances()
    device = device_of(embedder)
    if isinstance(objective, str):
        made: Objective = OBJECTIVES[objective](features.to(device), labels.to(device), **options)
    else:
        made = objective
    optimizer = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.98), weight_decay=5e-3)
    train_embedder(embedder, made, far, classes(far_y, far), settings, optimizer, seed)
    after = distances()
    return {name: {"before": before[name], "after": after[name]} for name in before}


@torch.no_grad()
def _features(embedder: nn.Module, x: Tensor) -> Tensor:
    """Token means (n, d) of images (n, C, H, W), on the CPU."""
    device = device_of(embedder)
    with as_found(embedder):
        return torch.cat([token_mean(embedder(part.to(device))).cpu() for part in x.split(64)])

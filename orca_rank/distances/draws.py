"""Which images a calibrated gap draws: halves, bootstrap resamples and exchanges between the sides, as counts.

The draws depend on the seed, the labels and the number of images alone, so that all layers, and all metrics, of one
pair of data sets share them; the last two sets of each kind are kept.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Bool, Int

Counts = Int[np.ndarray, "draws images"]  # how often each image is in a group
CACHED = 2  # sets of draws of each kind: with a metric's labels, and without


def split_draws(labels: Int[np.ndarray, " images"], splits: int, bootstrap: int, seed: int) -> list[list[Counts]]:
    """For every random halving S₁, S₂, T₁, T₂ as counts (1 + resamples, images): the halves themselves, then the halves
    with their members drawn again with replacement. The resamples of all halvings together are `bootstrap`.

    Args:
        labels: of the source's images, then of as many target images; members of a class go to the two halves in turn.

    Raises:
        ValueError: for no halving.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    return _split_draws(labels.astype(np.int64).tobytes(), splits, bootstrap, seed)


@functools.lru_cache(CACHED)
def _split_draws(labels: bytes, splits: int, bootstrap: int, seed: int) -> list[list[Counts]]:
    halves = _halves(np.frombuffer(labels, dtype=np.int64), splits, seed)
    turn = np.arange(bootstrap) % splits
    again = _resample([half[turn] for half in halves], np.random.default_rng([seed, 2]))
    return [
        [
            _kept(np.concatenate([half[split : split + 1], draws[turn == split]]))
            for half, draws in zip(halves, again, strict=True)
        ]
        for split in range(splits)
    ]


@functools.lru_cache(CACHED)
def side_draws(n: int, bootstrap: int, seed: int) -> list[Counts]:
    """Source and target, n images each, as counts (1 + bootstrap, 2 n): the sides themselves, then their resamples."""
    source = np.zeros((1, 2 * n), dtype=np.int64)
    source[0, :n] = 1
    sides = [source, 1 - source]
    again = _resample([np.repeat(side, bootstrap, axis=0) for side in sides], np.random.default_rng([seed, 2]))
    return [_kept(np.concatenate([side, draws])) for side, draws in zip(sides, again, strict=True)]


@functools.lru_cache(CACHED)
def exchanges(n: int, permutations: int, seed: int) -> Bool[np.ndarray, "draws images"]:
    """Which of 2 n images stand in the source's place: (1 + permutations, 2 n), the source itself first."""
    source = np.zeros((1, 2 * n), dtype=np.int64)
    source[0, :n] = 1
    generator = np.random.default_rng([seed, 3])
    members = generator.permuted(np.repeat(source, permutations, axis=0), axis=1)
    return _kept(np.concatenate([source, members]).astype(bool))


def _halves(labels: np.ndarray, splits: int, seed: int) -> list[np.ndarray]:
    """S₁, S₂, T₁, T₂ as counts (splits, 2 n): members of a class, in random order, go to the two halves in turn."""
    n = len(labels) // 2
    generator = np.random.default_rng([seed, 4])
    parts = [np.zeros((splits, 2 * n), dtype=np.int64) for _ in range(4)]
    for split in range(splits):
        for side in (0, 1):
            order = side * n + generator.permutation(n)
            order = order[np.argsort(labels[order], kind="stable")]
            parts[2 * side][split, order[0::2]] = 1
            parts[2 * side + 1][split, order[1::2]] = 1
    return parts


def _resample(groups: list[np.ndarray], generator: np.random.Generator) -> list[np.ndarray]:
    """Each group's members drawn again with replacement; a group never takes another's, so no image meets itself."""
    return [
        np.stack([generator.multinomial(row.sum(), row / row.sum()) for row in rows]) if len(rows) else rows
        for rows in groups
    ]


def _kept(draws: np.ndarray) -> np.ndarray:
    """Shared between layers, so nobody may write to it."""
    draws.flags.writeable = False
    return draws

"""Seeded splits that hold the classes in their proportions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

Index = Int[np.ndarray, " n"]


def stratified_order(labels: Index, seed: int) -> Index:
    """A seeded permutation every prefix of which holds the classes in their proportions, to within one sample each."""
    random = np.random.default_rng(seed)
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        key[members] = (np.arange(len(members)) + random.random()) / len(members)
    return np.argsort(key, kind="stable")


def take_test(order: Int[np.ndarray, " n"], fraction: float) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """Split an order into (test, rest)."""
    if not 0 < fraction < 1:
        raise ValueError(f"a fraction held out must lie between 0 and 1, received {fraction}")
    count = max(1, round(fraction * len(order)))
    return order[:count], order[count:]


def take_validation(
    order: Int[np.ndarray, " n"], fraction: float, limit: int | None
) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """(train, val) out of the first `limit` entries of an order.

    Raises:
        ValueError: if fewer than 2 samples are left to train on.
    """
    chosen = limited(order, limit, "train_limit")
    val, train = take_test(chosen, fraction)
    if len(train) < 2:
        raise ValueError(
            f"only {len(train)} sample(s) left to train on out of {len(order)} (train_limit={limit}, "
            f"val_fraction={fraction}): at least 2 are needed, give more data or raise train_limit"
        )
    return train, val


def limited(order: Int[np.ndarray, " n"], limit: int | None, name: str) -> Int[np.ndarray, " m"]:
    """The first `limit` entries, or all."""
    if limit is not None and limit < 1:
        raise ValueError(f"{name} must be at least 1 or null, received {limit}")
    return order[:limit]


def covered(
    train: Int[np.ndarray, " n"], part: Int[np.ndarray, " m"], labels: Int[np.ndarray, " k"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """(train, part) after a swap for every class that train has twice and part lacks: one of train's for one of the
    class that part has most of, where that is at least two. Where nothing is missing, nothing changes."""
    train, part = train.copy(), part.copy()
    for label in np.unique(labels[train]):
        ours = np.flatnonzero(labels[train] == label)
        if len(ours) < 2 or (labels[part] == label).any():
            continue
        values, counts = np.unique(labels[part], return_counts=True)
        if counts.max() < 2:
            break
        given = np.flatnonzero(labels[part] == values[counts.argmax()])[-1]
        train[ours[-1]], part[given] = part[given], train[ours[-1]]
    return train, part

"""Sliced Wasserstein between many groups of the same images, which are projected once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from orca_rank.distances.draws import Counts
from orca_rank.distances.sliced import directions

ELEMENTS = 2**16  # projected values of a group held at once: few enough to stay in the processor's cache


class SlicedScore:
    """d times the mean over directions of the squared one-dimensional W₂, so that a mean shift t counts ‖t‖² as in the
    other squared distances; a `Score`.

    W₂² = (difference of means)² + W₂² of the centred projections; the first, averaged over all directions, is
    ‖m_x − m_y‖²/d: only the second is left to chance. With k values a side it is the mean of (x_(u) − y_(u))² over the
    ranks u less the squared mean of x − y. Groups must be of equal size. Values are sorted in float32, which
    is faster than in float64 or than repeating sorted values: they are centred, so it costs 1e-6 of the score.
    """

    scale, unbiased, exchangeable = 1.0, False, True

    def __init__(self, pooled: Float[np.ndarray, "images d"], projections: int = 64, seed: int = 0, **_: int) -> None:
        self.pooled = torch.from_numpy(pooled)
        self.width = pooled.shape[1]
        self.projected = self.pooled @ directions(self.width, projections, seed, self.pooled)  # (images, L)

    def between(self, groups: Sequence[Counts], pairs: Sequence[tuple[int, int]]) -> Float[np.ndarray, "draws pairs"]:
        count, size = self.projected.shape[1], int(groups[0][0].sum())
        drawn = [_Drawn(self, group) for group in groups]
        values = torch.stack([(drawn[i].means - drawn[j].means).square().sum(1) for i, j in pairs], 1).numpy()
        shifts = torch.stack([(drawn[i].shifts - drawn[j].shifts).square().sum(1) for i, j in pairs], 1).numpy()
        squares = np.empty_like(values)
        step = max(1, ELEMENTS // (count * size))
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            ordered = [one.ordered(rows) for one in drawn]  # (L, rows, size) each
            for column, (i, j) in enumerate(pairs):
                squares[rows, column] = _squares(ordered[i], ordered[j])
        return values + self.width * (squares / size - shifts) / count

    def exchanged(self, sides: Bool[np.ndarray, "draws images"]) -> Float[np.ndarray, " draws"]:
        """Between the images marked in each row and all others, as many."""
        count, size = self.projected.shape[1], sides.shape[1] // 2
        signs = torch.from_numpy(2.0 * sides - 1)
        means = ((signs @ self.pooled).square().sum(1) / size**2).numpy()
        along = self.projected - self.projected.mean(0)
        shifts = ((signs @ along).square().sum(1) / size**2).numpy()
        values = _along(along)
        squares = np.empty(len(sides))
        step = max(1, ELEMENTS // (count * size))
        for start in range(0, len(sides), step):
            marked = sides[start : start + step]
            left, right = (values.take(np.nonzero(side)[1].reshape(-1, size), axis=1) for side in (marked, ~marked))
            left.sort(axis=2)
            right.sort(axis=2)
            squares[start : start + step] = _squares(left, right)
        return means + self.width * (squares / size - shifts) / count


class _Drawn:
    """A group's draws: means (draws, d) of the features, and shifts (draws, L) of the projections from the mean of all
    its members, which is taken away from the values so that they keep their digits."""

    def __init__(self, score: SlicedScore, counts: Counts) -> None:
        members = np.flatnonzero(counts.any(axis=0))
        drawn = counts[:, members]
        weights = torch.from_numpy(drawn / drawn.sum(axis=1, keepdims=True))
        index = torch.from_numpy(members)
        self.means: Tensor = weights @ score.pooled[index]
        along = score.projected[index]  # (members, L)
        along = along - along.mean(0)
        self.shifts: Tensor = weights @ along
        self.values = _along(along)
        everyone = np.broadcast_to(np.arange(len(members)), drawn.shape)
        self.rows: Int[np.ndarray, "draws size"] = np.repeat(everyone.ravel(), drawn.ravel()).reshape(len(drawn), -1)

    def ordered(self, rows: slice) -> Float[np.ndarray, "L rows size"]:
        """The values of these draws, ascending within each projection."""
        values = self.values.take(self.rows[rows], axis=1)
        values.sort(axis=2)
        return values


def _along(projected: Float[Tensor, "images L"]) -> Float[np.ndarray, "L images"]:
    return np.ascontiguousarray(projected.T.float().numpy())


def _squares(x: Float[np.ndarray, "L rows size"], y: Float[np.ndarray, "L rows size"]) -> Float[np.ndarray, " rows"]:
    difference = x - y
    return np.einsum("lru,lru->r", difference, difference)

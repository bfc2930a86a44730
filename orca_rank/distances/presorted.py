"""Sliced Wasserstein between many groups of the same images, whose projections are computed and sorted once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from orca_rank.distances.draws import Counts
from orca_rank.distances.sliced import directions

ELEMENTS = 2**14  # projected values of a group held at once: few enough to stay in the processor's cache


class SlicedScore:
    """d times the mean over directions of the squared one-dimensional W₂, so that a mean shift t counts ‖t‖² as in the
    other squared distances; a `Score`.

    W₂² = (difference of means)² + W₂² of the centred projections; the first, averaged over all directions, is
    ‖m_x − m_y‖²/d: only the second is left to chance. With k values a side it is the mean of (x_(u) − y_(u))² over the
    ranks u less the squared mean of x − y, and a group's sorted values are the sorted values of all images, each
    repeated as often as it is drawn. Groups must be of equal size.
    """

    scale, unbiased, exchangeable = 1.0, False, True

    def __init__(self, pooled: Float[np.ndarray, "images d"], projections: int = 64, seed: int = 0, **_: int) -> None:
        self.pooled = torch.from_numpy(pooled)
        self.width = pooled.shape[1]
        self.projected = self.pooled @ directions(self.width, projections, seed, self.pooled)  # (images, L)
        along = np.ascontiguousarray(self.projected.numpy().T)
        self.order = along.argsort(axis=1)  # (L, images)
        self.ranked = np.take_along_axis(along, self.order, axis=1)

    def between(self, groups: Sequence[Counts], pairs: Sequence[tuple[int, int]]) -> Float[np.ndarray, "draws pairs"]:
        count, size = len(self.order), int(groups[0][0].sum())
        drawn = [_Drawn(self, group) for group in groups]
        values = torch.stack([(drawn[i].means - drawn[j].means).square().sum(1) for i, j in pairs], 1).numpy()
        shifts = torch.stack([(drawn[i].shifts - drawn[j].shifts).square().sum(1) for i, j in pairs], 1).numpy()
        squares = np.empty_like(values)
        step = max(1, ELEMENTS // (count * size))
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            ordered = [one.ordered(rows) for one in drawn]
            for column, (i, j) in enumerate(pairs):
                difference = ordered[i] - ordered[j]
                squares[rows, column] = np.einsum("bu,bu->b", difference, difference)
        return values + self.width * (squares / size - shifts) / count

    def exchanged(self, sides: Bool[np.ndarray, "draws images"]) -> Float[np.ndarray, " draws"]:
        """Between the images marked in each row and all others, as many."""
        count, size = len(self.order), sides.shape[1] // 2
        signs = torch.from_numpy(2.0 * sides - 1)
        means = (signs @ self.pooled).square().sum(1) / size**2
        shifts = (signs @ self.projected).square().sum(1) / size**2
        # Σ (x_(u) − y_(u))² = Σ over all images of their squares − 2 Σ x_(u) y_(u).
        ranked, order = self.ranked.ravel(), self.order.ravel()
        cross = np.empty(len(sides))
        for draw, side in enumerate(sides):
            marked = side.take(order)
            cross[draw] = ranked.compress(marked) @ ranked.compress(~marked)
        squares = float(ranked @ ranked) - 2 * torch.from_numpy(cross)
        return (means + self.width * (squares / size - shifts) / count).numpy()


class _Drawn:
    """A group's draws: means (draws, d) of the features, and shifts (draws, L) of the projections from the mean of all
    its members, which is taken away from the values so that they keep their digits."""

    def __init__(self, score: SlicedScore, counts: Counts) -> None:
        members = np.flatnonzero(counts.any(axis=0))
        weights = torch.from_numpy(counts[:, members] / counts.sum(axis=1, keepdims=True))
        index = torch.from_numpy(members)
        self.means: Tensor = weights @ score.pooled[index]
        along = score.projected[index]  # (members, L)
        centre = along.mean(0)
        self.shifts: Tensor = weights @ (along - centre)
        inside = np.zeros(counts.shape[1], dtype=bool)
        inside[members] = True
        order = score.order.ravel()
        chosen = inside.take(order)
        self.order: Int[np.ndarray, " places"] = order.compress(chosen)
        ranked = score.ranked.ravel().compress(chosen).reshape(len(score.order), -1)
        self.ranked = (ranked - centre.numpy()[:, None]).ravel()
        self.counts = counts

    def ordered(self, rows: slice) -> Float[np.ndarray, "rows values"]:
        """The values of these draws, ascending within each projection, one projection after the other."""
        counts = self.counts[rows].take(self.order, axis=1)
        values = np.broadcast_to(self.ranked, counts.shape)
        return np.repeat(values.ravel(), counts.ravel()).reshape(len(counts), -1)

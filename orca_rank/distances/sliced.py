"""Sliced Wasserstein distances: transport along random directions, where sorting solves it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from orca_rank.distances._inputs import full_precision, pair


def directions(d: int, count: int, seed: int, like: Tensor) -> Tensor:
    """Unit vectors (d, count), orthonormal within every block of d, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, count, d):
        gaussian = torch.randn(d, min(d, count - start), generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        blocks.append(q * r.diagonal().sign())
    return torch.cat(blocks, 1).to(like)


def _coupling(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of n with m equal masses: ranks i, j and masses, (n + m − gcd,)."""
    left = torch.arange(1, n + 1, dtype=torch.long) * m  # cumulative masses in units of 1 / (n m)
    right = torch.arange(1, m + 1, dtype=torch.long) * n
    ends = torch.cat([left, right]).unique()
    mass = torch.diff(ends, prepend=ends.new_zeros(1)).double() / (n * m)
    return torch.searchsorted(left, ends).to(device), torch.searchsorted(right, ends).to(device), mass.to(device)


def one_dimensional(x: Tensor, y: Tensor, p: int) -> Tensor:
    """W_p^p of every column of x (n, L) and y (m, L), (L,); differentiable."""
    x, y = x.sort(0).values, y.sort(0).values
    if len(x) == len(y):
        return (x - y).abs().pow(p).mean(0)
    i, j, mass = _coupling(len(x), len(y), x.device)
    return mass.to(x) @ (x[i] - y[j]).abs().pow(p)


def _average(x: Tensor, y: Tensor, projections: int, seed: int, p: int, chunk: int = 8) -> Tensor:
    theta = directions(x.shape[1], projections, seed, x)  # (d, L)
    return torch.cat([one_dimensional(x @ part, y @ part, p) for part in theta.split(chunk, 1)]).mean()


@full_precision
def sliced_wasserstein(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, p: int = 2, projections: int = 64, seed: int = 0
) -> Float[Tensor, ""]:
    """SW_p^p = mean over directions θ of W_p^p(θᵀx, θᵀy) (Rabin et al. 2011; Bonneel et al. 2015, eq. 6).

    Args:
        x: (n, d). y: (m, d), m may differ. p: 1 or 2. projections: random directions, orthonormal within blocks of d.
        seed: of the directions, so that repeated calls agree.

    Raises:
        ValueError: for another p, no projections, bad shapes or values that are not finite.
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, received {p}")
    if projections < 1:
        raise ValueError(f"projections must be at least 1, received {projections}")
    x, y = pair(x, y)
    return _average(x, y, projections, seed, p)


class _Coordinates(torch.autograd.Function):
    """Classical scaling: W (K, K) -> E (K, q) with ‖E_c − E_c′‖² as near W as Euclidean space allows.

    A function of E that does not change when E is rotated has dV/dG = ½ (A E⁺ symmetrised), A = dV/dE, G = EEᵀ; this
    needs no gap between eigenvalues.
    """

    @staticmethod
    def forward(ctx: Any, distances: Tensor) -> Tensor:
        gram = _centre(distances.double()) / -2
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        keep = values > 1e-9 * values[-1].clamp_min(1e-300)
        coordinates = vectors[:, keep] * values[keep].sqrt()
        ctx.save_for_backward(coordinates)
        return coordinates.to(distances.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (coordinates,) = ctx.saved_tensors
        inner = (
            grad.double() @ torch.linalg.pinv(coordinates) / 2
            if coordinates.shape[1]
            else (grad.new_zeros(len(grad), len(grad)).double())
        )
        return (_centre((inner + inner.T) / 2) / -2).to(grad.dtype)


def _centre(matrix: Tensor) -> Tensor:
    return matrix - matrix.mean(0, keepdim=True) - matrix.mean(1, keepdim=True) + matrix.mean()


def sliced_with_labels(
    x: Tensor, x_index: Tensor, y: Tensor, y_index: Tensor, label_distances: Tensor, projections: int, seed: int
) -> Tensor:
    """D · SW₂² of (features, label coordinates), D their dimension, in units of the full squared cost.

    Args:
        x: (n, d). x_index: (n,) in 0..K−1. y: (m, d). y_index: (m,) in 0..L−1. label_distances: (K + L, K + L).
    """
    coordinates = _Coordinates.apply(label_distances)  # (K + L, q)
    dimension = x.shape[1] + coordinates.shape[1]
    theta = directions(dimension, projections, seed, x)
    start = int(x_index.max()) + 1
    values = []
    for part in theta.split(8, 1):
        labels = coordinates @ part[x.shape[1] :]  # (K + L, 8)
        features = part[: x.shape[1]]
        values.append(one_dimensional(x @ features + labels[x_index], y @ features + labels[start + y_index], 2))
    return dimension * torch.cat(values).mean()

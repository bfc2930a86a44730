"""Bures-Wasserstein distances between Gaussian fits, by nuclear norms of small matrices.

    W₂²(N(m₁, S₁), N(m₂, S₂)) = ‖m₁ − m₂‖² + tr S₁ + tr S₂ − 2 tr (S₁^½ S₂ S₁^½)^½

With S = AᵀA (A the centred samples over √(n − ddof)) the last trace is the nuclear norm ‖A₁ A₂ᵀ‖_*, whose gradient
is U Vᵀ A₂ for A₁: no matrix root, no 1/(σᵢ − σⱼ).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from orca_rank.distances._inputs import full_precision, pair

# Nuclear norms and gradients of 200 products of 10 x 29: 22 ms one by one, 8 ms batched by singular values, 5 ms by
# Gram matrices; of ten of 128 x 128: 32, 25 and 34 ms (benchmarks/distances.py --only norms, an AMD EPYC with AVX2).
SMALL_SIDE = 32  # up to here by Gram matrices
BATCH_ELEMENTS = 2**16  # in one batch; more is no faster, and memory stays bounded


def factor(x: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean (d,) and A (n, d) with AᵀA the covariance of x (n, d) divided by max(n − ddof, 1)."""
    mean = x.mean(0)
    return mean, (x - mean) / max(x.shape[0] - ddof, 1) ** 0.5


def _norm_and_polar(product: Tensor, polar: bool) -> tuple[Tensor, Tensor | None]:
    """‖M‖_* (p,) of a batch M (p, r, s) and, if asked, its gradient U Vᵀ (p, r, s), zero on directions without mass.

    Float32 matrices with a side of at most SMALL_SIDE go by the eigenvalues of the float64 Gram matrix of that side,
    which loses nothing that float32 holds; others by singular values, which are no slower there.
    """
    side = min(product.shape[1:])
    precision = max(product.shape[1:]) * torch.finfo(product.dtype).eps
    if product.dtype == torch.float32 and (side <= SMALL_SIDE or not polar):
        wide = product.double() if product.shape[1] <= product.shape[2] else product.mT.double()  # (p, side, ·)
        gram = wide @ wide.mT
        if not polar:
            return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum(1).float(), None
        squares, u = torch.linalg.eigh(gram)  # ascending
        sigma = squares.clamp_min(0).sqrt()
        inverse = torch.where(sigma > precision * sigma[:, -1:], 1 / sigma, 0.0)
        rotation = ((u * inverse[:, None, :]) @ u.mT @ wide).float()  # (M Mᵀ)^-½ M = U Vᵀ
        return sigma.sum(1).float(), rotation if product.shape[1] <= product.shape[2] else rotation.mT
    if not polar:
        return torch.linalg.svdvals(product).sum(1), None
    u, sigma, vh = torch.linalg.svd(product, full_matrices=False)
    return sigma.sum(1), (u * (sigma > precision * sigma[:, :1])[:, None, :]) @ vh


class _NuclearNorms(torch.autograd.Function):
    """‖A_i B_jᵀ‖_* of the pairs (i, j) of stacked factors A (K, r, d) and B (L, s, d), (p,).

    Pairs go in batches: one call for hundreds of small matrices, one each for large ones.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, left: Tensor, right: Tensor) -> Tensor:
        size = max(1, BATCH_ELEMENTS // (a.shape[1] * b.shape[1]))
        grad = any(ctx.needs_input_grad)
        norms: list[Tensor] = []
        polars: list[Tensor] = []
        for i, j in zip(left.split(size), right.split(size), strict=True):
            norm, polar = _norm_and_polar(a[i] @ b[j].mT, grad)  # products (size, r, s)
            norms.append(norm)
            if polar is not None:
                polars.append(polar)
        ctx.save_for_backward(a, b, left, right, *polars)
        return torch.cat(norms)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, left, right, *polars = ctx.saved_tensors
        grad_a = torch.zeros_like(a) if ctx.needs_input_grad[0] else None
        grad_b = torch.zeros_like(b) if ctx.needs_input_grad[1] else None
        size = len(polars[0])
        for polar, i, j, weight in zip(polars, left.split(size), right.split(size), grad.split(size), strict=True):
            weighted = weight[:, None, None] * polar
            if grad_a is not None:
                grad_a.index_add_(0, i, weighted @ b[j])
            if grad_b is not None:
                grad_b.index_add_(0, j, weighted.mT @ a[i])
        return grad_a, grad_b, None, None


class _Compress(torch.autograd.Function):
    """Pads or rotates factors A_c (n_c, d) to one stack (K, r, d), r = min(max n_c, d), with the same AᵀA.

    A_c = Q R is replaced by R where n_c > r; a nuclear norm sees only AᵀA, so the gradient of A_c is Q times that
    of R.
    """

    @staticmethod
    def forward(ctx: Any, rank: int, *factors: Tensor) -> Tensor:
        stack = factors[0].new_zeros(len(factors), rank, factors[0].shape[1])
        rotations: list[Tensor] = []
        for k, a in enumerate(factors):
            if a.shape[0] > rank:
                q, stack[k] = torch.linalg.qr(a)
                rotations.append(q)
            else:
                stack[k, : a.shape[0]] = a
                rotations.append(a[:0])
        ctx.save_for_backward(*rotations)
        ctx.sizes = [a.shape[0] for a in factors]
        return stack

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pieces = [
            q @ grad[k] if len(q) else grad[k, :size]
            for k, (q, size) in enumerate(zip(ctx.saved_tensors, ctx.sizes, strict=True))
        ]
        return None, *pieces


class GaussianClasses:
    """Mean and covariance factor of every class of a labelled sample.

    Args:
        x: (n, d). index: (n,) class of each sample, 0..K−1. counts: (K,). ddof: covariances over n_c − ddof.
    """

    def __init__(self, x: Tensor, index: Tensor, counts: Tensor, ddof: int) -> None:
        groups = x[index.argsort(stable=True)].split(counts.tolist())
        means, factors = zip(*(factor(group, ddof) for group in groups), strict=True)
        self.means = torch.stack(means)  # (K, d)
        self.traces = torch.stack([a.square().sum() for a in factors])  # (K,)
        self.stack = _Compress.apply(min(int(counts.max()), x.shape[1]), *factors)  # (K, r, d)

    def distances(self, other: GaussianClasses) -> Tensor:
        """Squared Bures-Wasserstein distances, (K, L)."""
        left, right = torch.ones(len(self.traces), len(other.traces), device=self.traces.device).nonzero().T
        norms = _NuclearNorms.apply(self.stack, other.stack, left, right).view(len(self.traces), -1)
        spread = (self.traces[:, None] + other.traces - 2 * norms).clamp_min(0)
        return (self.means[:, None] - other.means).square().sum(2) + spread

    def own_distances(self) -> Tensor:
        """The same between the classes of one sample, (K, K), symmetric with zero diagonal."""
        size = len(self.traces)
        left, right = torch.triu_indices(size, size, 1, device=self.traces.device)
        upper = self.traces.new_zeros(size, size)
        if size > 1:
            norms = _NuclearNorms.apply(self.stack, self.stack, left, right)
            spread = (self.traces[left] + self.traces[right] - 2 * norms).clamp_min(0)
            apart = (self.means[left] - self.means[right]).square().sum(1)
            upper = upper.index_put((left, right), apart + spread)
        return upper + upper.T


@full_precision
def bures_wasserstein(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, ddof: int = 1) -> Float[Tensor, ""]:
    """Squared 2-Wasserstein distance of the Gaussian fits of two samples (the Fréchet distance, Dowson & Landau 1982).

        ‖m_x − m_y‖² + tr S_x + tr S_y − 2 tr (S_x^½ S_y S_x^½)^½

    Args:
        x: (n, d). y: (m, d). ddof: covariances are divided by n − ddof; 1 is the unbiased estimate.

    Raises:
        ValueError: for bad shapes or values that are not finite.
    """
    x, y = pair(x, y)
    fits = [GaussianClasses(z, z.new_zeros(len(z)).long(), torch.tensor([len(z)]), ddof) for z in (x, y)]
    return fits[0].distances(fits[1]).squeeze()

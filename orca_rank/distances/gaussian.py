"""Bures-Wasserstein distances between Gaussian fits, by nuclear norms of small matrices.

    W₂²(N(m₁, S₁), N(m₂, S₂)) = ‖m₁ − m₂‖² + tr S₁ + tr S₂ − 2 tr (S₁^½ S₂ S₁^½)^½

With S = AᵀA (A the centred samples over √(n − ddof)) the last trace is the nuclear norm ‖A₁ A₂ᵀ‖_*, whose gradient
is U Vᵀ A₂ for A₁: no matrix root, no 1/(σᵢ − σⱼ).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orca_rank.distances._inputs import full_precision, pair


def factor(x: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean (d,) and A (n, d) with AᵀA the covariance of x (n, d) divided by max(n − ddof, 1)."""
    mean = x.mean(0)
    return mean, (x - mean) / max(x.shape[0] - ddof, 1) ** 0.5


def _nuclear_norm(product: Tensor) -> Tensor:
    """‖M‖_* of a batch (p, r, s). For float32 from the float64 Gram matrix, which is exact enough and faster."""
    if product.dtype == torch.float64:
        return torch.linalg.svdvals(product).sum(1)
    wide = product.double()
    gram = wide.mT @ wide if product.shape[2] <= product.shape[1] else wide @ wide.mT
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum(1).to(product.dtype)


class _NuclearNorms(torch.autograd.Function):
    """‖A_i B_jᵀ‖_* of stacked factors A (K, r, d) and B (L, s, d), (K, L); only j > i where `own`."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, own: bool) -> Tensor:
        norms = a.new_zeros(len(a), len(b))
        polars: list[Tensor] = []
        for i, left in enumerate(a):
            right = b[i + 1 :] if own else b
            product = (left @ right.flatten(0, 1).T).view(len(left), *right.shape[:2]).permute(1, 0, 2)  # (p, r, s)
            if not any(ctx.needs_input_grad):
                norms[i, len(b) - len(right) :] = _nuclear_norm(product)
                continue
            u, sigma, vh = torch.linalg.svd(product, full_matrices=False)
            norms[i, len(b) - len(right) :] = sigma.sum(1)
            # Directions without mass get the zero subgradient.
            cut = sigma[:, :1] * max(product.shape[1:]) * torch.finfo(sigma.dtype).eps
            polars.append((u * (sigma > cut)[:, None, :]) @ vh)  # U Vᵀ (p, r, s)
        ctx.save_for_backward(a, b, *polars)
        return norms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, *polars = ctx.saved_tensors
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        for i, polar in enumerate(polars):
            first = len(b) - len(polar)
            weighted = grad[i, first:, None, None] * polar
            grad_a[i] += (weighted @ b[first:]).sum(0)
            grad_b[first:] += weighted.mT @ a[i]
        return grad_a, grad_b, None


class _Compress(torch.autograd.Function):
    """Pads or rotates factors A_c (n_c, d) to one stack (K, r, d), r = min(max n_c, d), with the same AᵀA.

    A_c = Q R is replaced by R where n_c > r; a nuclear norm sees only AᵀA, so the gradient of A_c is Q times that
    of R.
    """

    @staticmethod
    def forward(ctx, rank: int, *factors: Tensor) -> Tensor:
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
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
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
        norms = _NuclearNorms.apply(self.stack, other.stack, False)
        spread = (self.traces[:, None] + other.traces - 2 * norms).clamp_min(0)
        return (self.means[:, None] - other.means).square().sum(2) + spread

    def own_distances(self) -> Tensor:
        """The same between the classes of one sample, (K, K), symmetric with zero diagonal."""
        norms = _NuclearNorms.apply(self.stack, self.stack, True)
        spread = (self.traces[:, None] + self.traces - 2 * norms).clamp_min(0)
        upper = ((self.means[:, None] - self.means).square().sum(2) + spread).triu(1)
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

"""Sums of a radial function over all pairs of two samples, by row chunks, with the gradient in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orca_rank.distances._inputs import squared_distances

# Maps squared distances D to (φ(D), dφ/dD); it may overwrite D.
Radial = Callable[[Tensor], tuple[Tensor, Tensor]]
ELEMENTS = 2**21  # pairs held at once


class _PairSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, radial: Radial, same: bool) -> Tensor:
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_x = torch.zeros_like(x) if needs else None
        grad_y = torch.zeros_like(y) if needs and not same else None
        total = x.new_zeros((), dtype=torch.float64)
        rows = max(1, ELEMENTS // len(y))
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            distances = squared_distances(part, y)  # (rows, m)
            if same:
                distances.diagonal(start).zero_()
            values, slopes = radial(distances)
            if same:
                values.diagonal(start).zero_()
            total += values.sum(dtype=torch.float64)
            if grad_x is not None:
                # ∂φ(‖x − y‖²)/∂x = 2 φ′ (x − y)
                grad_x[start : start + rows] = 2 * (slopes.sum(1, keepdim=True) * part - slopes @ y)
            if grad_y is not None:
                grad_y += 2 * (slopes.sum(0)[:, None] * y - slopes.T @ part)
        if grad_x is not None and same:
            grad_x *= 2
        ctx.save_for_backward(*(g for g in (grad_x, grad_y) if g is not None))
        ctx.same = same
        return total.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.same:
            return grad * ctx.saved_tensors[0], None, None, None
        grad_x, grad_y = ctx.saved_tensors
        return grad * grad_x, grad * grad_y, None, None


def pair_sum(x: Tensor, y: Tensor | None, radial: Radial) -> Tensor:
    """Σ_ij φ(‖x_i − y_j‖²); Σ_{i≠j} φ(‖x_i − x_j‖²) where y is None."""
    return _PairSum.apply(x, x.detach() if y is None else y, radial, y is None)


def gaussian_radial(bandwidth: float, kernels: int) -> Radial:
    """φ(D) = Σ_i exp(−D / h_i), h_i = h 2^{i − ⌊kernels/2⌋}: one exponential, the others by repeated squaring."""
    widest = bandwidth * 2.0 ** (kernels - 1 - kernels // 2)

    def radial(distances: Tensor) -> tuple[Tensor, Tensor]:
        power = distances.mul_(-1 / widest).exp_()
        values, slopes = power.clone(), power * (-1 / widest)
        for k in range(1, kernels):
            power.square_()
            values += power
            slopes.add_(power, alpha=-(2.0**k) / widest)
        return values, slopes

    return radial


def distance_radial(distances: Tensor) -> tuple[Tensor, Tensor]:
    """φ(D) = √D; the slope at D = 0 is taken as 0."""
    values = distances.sqrt_()
    slopes = torch.where(values > 0, 0.5 / values, 0.0)
    return values, slopes

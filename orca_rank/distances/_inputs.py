"""What every distance does first: check its inputs, leave autocast, work in float32 or better."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run a distance outside autocast, so that bf16 training never lowers its precision."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = {a.device.type for a in args if isinstance(a, Tensor)} | {"cpu"}
        with torch.autocast("cpu", enabled=False):
            if devices == {"cpu"}:
                return function(*args, **kwargs)
            with torch.autocast((devices - {"cpu"}).pop(), enabled=False):
                return function(*args, **kwargs)

    return wrapped


def points(x: Tensor, name: str, minimum: int = 1) -> Tensor:
    """x (n, d) as float32, or float64 if it is float64.

    Raises:
        TypeError: if it is no tensor. ValueError: for another shape, too few rows, or values that are not finite.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (n, d), received {type(x).__name__}")
    if x.ndim != 2 or x.shape[0] < minimum or x.shape[1] < 1:
        raise ValueError(f"{name} must have shape (n, d) with n >= {minimum} and d >= 1, received {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must hold floating-point features, received {x.dtype}: convert it with .float()")
    if not bool(torch.isfinite(x.detach()).all()):
        bad = int((~torch.isfinite(x.detach())).sum())
        raise ValueError(f"{name} must be finite, received {bad} NaN or infinite values of {x.numel()}")
    return x if x.dtype == torch.float64 else x.float()


def pair(x: Tensor, y: Tensor, minimum: int = 1) -> tuple[Tensor, Tensor]:
    """Both samples in one dtype, shifted by their common mean (distances do not see it, rounding does).

    Raises:
        ValueError: as `points`, or if the two differ in width or device.
    """
    x, y = points(x, "x", minimum), points(y, "y", minimum)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same width d, received {tuple(x.shape)} and {tuple(y.shape)}")
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device, received {x.device} and {y.device}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    shift = (x.detach().mean(0) + y.detach().mean(0)) / 2
    return x - shift, y - shift


def classes(label: Tensor | None, n: int, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels as indices 0..K−1 in the order of their values, and the number of samples of each.

    Args:
        label: (n,) integers of any values, or None for one class.

    Raises:
        TypeError: if it is no tensor. ValueError: for another shape or dtype.
    """
    if label is None:
        return torch.zeros(n, dtype=torch.long, device=device), torch.tensor([n], device=device)
    if not isinstance(label, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape ({n},), received {type(label).__name__}")
    if label.shape != (n,):
        raise ValueError(f"{name} must have one label per sample, shape ({n},), received {tuple(label.shape)}")
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, received {label.dtype}: convert it with .long()")
    _, index, counts = torch.unique(label.to(device), return_inverse=True, return_counts=True)
    return index, counts


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² by one matrix product, never negative; (n, d), (m, d) -> (n, m)."""
    squares = torch.addmm(y.square().sum(1)[None, :], x, y.T, alpha=-2)  # (n, m)
    return squares.add_(x.square().sum(1)[:, None]).clamp_(min=0)


class Envelope(torch.autograd.Function):
    """A value whose gradients are already known (by the envelope theorem): hands them out in backward."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)

"""What every distance does first: check its inputs, leave autocast, work in float32 or better."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


SAMPLES = {"x": "x_label", "y": "y_label", "source": "label", "target": "label"}  # a sample and its labels


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Check the samples among a distance's arguments, then run it outside autocast, whatever the training precision."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        device = _check(given)
        with torch.autocast("cpu", enabled=False), torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def _check(given: Mapping[str, Any]) -> str:
    """Check every sample and its labels by the names of SAMPLES; the device they are on."""
    seen: dict[str, Tensor] = {}
    for name, label in SAMPLES.items():
        if name in given:
            _check_sample(given[name], name)
            seen[name] = given[name]
            label = label if label in given else "label"
            if given.get(label) is not None:
                _check_label(given[label], len(given[name]), label)
    x, *rest = seen.values()
    for other in rest:
        if x.shape[1] != other.shape[1]:
            raise ValueError(f"x and y must have the same width d, received {tuple(x.shape)} and {tuple(other.shape)}")
        if x.device != other.device:
            raise ValueError(f"x and y must be on one device, received {x.device} and {other.device}")
    return x.device.type


def _check_sample(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (n, d), received {type(x).__name__}")
    if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(f"{name} must have shape (n, d) with n >= 1 and d >= 1, received {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must hold floating-point features, received {x.dtype}: convert it with .float()")
    if not bool(torch.isfinite(x.detach()).all()):
        bad = int((~torch.isfinite(x.detach())).sum())
        raise ValueError(f"{name} must be finite, received {bad} NaN or infinite values of {x.numel()}")


def _check_label(label: Any, n: int, name: str) -> None:
    if not isinstance(label, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape ({n},), received {type(label).__name__}")
    if label.shape != (n,):
        raise ValueError(f"{name} must have one label per sample, shape ({n},), received {tuple(label.shape)}")
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, received {label.dtype}: convert it with .long()")


def points(x: Tensor) -> Tensor:
    """x as float32, or float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def pair(x: Tensor, y: Tensor, minimum: int = 1) -> tuple[Tensor, Tensor]:
    """Both samples in one dtype, shifted by their common mean (distances do not see it, rounding does).

    Raises:
        ValueError: if either has fewer than `minimum` rows.
    """
    for name, z in (("x", x), ("y", y)):
        if len(z) < minimum:
            raise ValueError(f"{name} must have at least {minimum} rows here, received {tuple(z.shape)}")
    dtype = torch.promote_types(points(x).dtype, points(y).dtype)
    x, y = x.to(dtype), y.to(dtype)
    shift = (x.detach().mean(0) + y.detach().mean(0)) / 2
    return x - shift, y - shift


def classes(label: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels (n,) of any integers as indices 0..K−1 in their order, and the samples of each; None is one class."""
    if label is None:
        return torch.zeros(n, dtype=torch.long, device=device), torch.tensor([n], device=device)
    _, index, counts = torch.unique(label.to(device), return_inverse=True, return_counts=True)
    return index, counts


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² by one matrix product, never negative; (n, d), (m, d) -> (n, m)."""
    squares = torch.addmm(y.square().sum(1)[None, :], x, y.T, alpha=-2)  # (n, m)
    return squares.add_(x.square().sum(1)[:, None]).clamp_(min=0)


class Envelope(torch.autograd.Function):
    """A value whose gradients are already known (by the envelope theorem): hands them out in backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)
